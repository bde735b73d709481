"""Admins' routes: users, rebuilds, data quality, roll-out, dead letters, features, audit trail.

Each route answers a browser with a page and other clients with JSON. Every change is recorded in the audit trail.
"""
