"""Makes PostgreSQL vacuum the tables of events after 1 % of new rows, not 20 %.

An index-only scan reads the table for rows that no vacuum has seen. In a table that keeps events for a year, the last
20 % are all events in the window of a feature.

Revision ID: 0015
"""

from app.migrations.statements import on_postgres, run

revision = "0015"
down_revision = "0014"

TABLES = ("event_log", "tip_views", "tip_feedback")
OPTION = "autovacuum_vacuum_insert_scale_factor"


def upgrade() -> None:
    if on_postgres():
        run(*(f"ALTER TABLE {table} SET ({OPTION} = 0.01)" for table in TABLES))
