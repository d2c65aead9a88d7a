"""Health, status and metrics, and the HTTP server that shows them."""
