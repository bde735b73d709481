"""Admins' routes: users, rebuilds, data quality, roll-out, dead letters, features, audit trail.

Each route answers with a page to a browser and with JSON to any other client. Every change is recorded in the audit
trail.
"""
