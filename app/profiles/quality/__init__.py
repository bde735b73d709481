"""Data quality: how alive and how true the cache is, how values are distributed, and whether that has changed."""
