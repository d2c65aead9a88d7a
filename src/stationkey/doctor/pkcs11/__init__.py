"""Checks of PKCS#11 tokens."""
