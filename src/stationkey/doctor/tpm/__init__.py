"""Checks of the TPM."""
