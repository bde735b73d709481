"""Profiles of users: reading them through the cache, invalidation, rebuilds, past moments and quality."""
