"""TLS services that use an active key: their configuration, and a check of it."""
