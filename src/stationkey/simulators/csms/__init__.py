"""A CSMS."""
