"""Alembic migrations: from an empty file to the schema that `app.stores.sqlite` speaks to."""
