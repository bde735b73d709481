"""SQLite: the facts, the log of events, what is owed, and the bookkeeping of admins."""
