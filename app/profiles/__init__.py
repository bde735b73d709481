"""Profiles of users: cached reads, invalidation, rebuilds, profiles as of past moments, and data quality."""
