"""The broker: connection, TLS, and the messages received and answered over it."""
