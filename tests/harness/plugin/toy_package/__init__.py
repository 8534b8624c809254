"""Somebody's own package: an architecture and a task that longarch knows nothing of."""
