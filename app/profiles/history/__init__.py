"""Profiles as of past moments: which moments may be asked for, and the timeline of a user."""
