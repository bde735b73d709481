"""Data quality: freshness of the cache, distributions of values, and drift."""
