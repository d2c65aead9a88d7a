"""CSRs and certificates."""
