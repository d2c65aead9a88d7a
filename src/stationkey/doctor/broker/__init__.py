"""Checks of the broker."""
