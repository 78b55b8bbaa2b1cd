"""``redline watch``: a live view of a running job, from its metrics endpoint or its record."""
