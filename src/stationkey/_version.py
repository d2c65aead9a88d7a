"""The version of this package, read by the build, the command, the metrics and the status."""

__version__ = "0.1.0"
