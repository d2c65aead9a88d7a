"""What the operating system is asked: files, logs, sockets, systemd, hardening."""
