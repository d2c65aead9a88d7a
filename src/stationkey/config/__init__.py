"""The configuration: settings, the file, secrets."""
