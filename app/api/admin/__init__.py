"""Admins' routes: look at a user, rebuild, watch. A page for a browser, JSON otherwise. Every change is audited."""
