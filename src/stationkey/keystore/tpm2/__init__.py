"""The key store in a TPM 2.0."""
