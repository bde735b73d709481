"""Rebuilding cached profiles, as runs that survive their worker."""
