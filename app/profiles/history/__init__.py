"""Profiles as of past moments: for which moments they can be computed, and the timeline of a user."""
