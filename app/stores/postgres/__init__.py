"""PostgreSQL as the store: the engine, and the statements that differ from those of SQLite."""
