"""Health, status, metrics and the status page, and their HTTP server."""
