"""Profiles as of past moments."""
