"""The operating system: files, logs, sockets, systemd, hardening."""
