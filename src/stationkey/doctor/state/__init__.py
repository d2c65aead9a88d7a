"""Checks of the state directory."""
