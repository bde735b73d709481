"""SQLite: the event log, the computation of features, and the repositories of all other rows."""
