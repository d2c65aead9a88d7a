"""Answer requests, apply statuses, end keys."""
