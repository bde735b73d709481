"""Admins' routes about dead letters."""
