"""Requests answered, statuses acted on, keys brought to their end."""
