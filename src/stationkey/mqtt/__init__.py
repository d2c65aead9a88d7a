"""The broker: connection, TLS, and what is received and answered over it."""
