"""Makes PostgreSQL vacuum the tables of events after 1 % of new rows, not 20 %.

An index-only scan must read the table itself for rows that no vacuum has seen. In a table that keeps events for a year,
the last 20 % can include all events in the window of a feature.
"""

from alembic import op
from sqlalchemy import text

from app.migrations import on_postgres, run

revision = "0015"
down_revision = "0014"

TABLES = ("event_log", "tip_views", "tip_feedback")
OPTION = "autovacuum_vacuum_insert_scale_factor"
# The table, or its partitions: a partitioned table has no storage parameters.
SELECT_STORED = """
SELECT CAST(CAST(oid AS regclass) AS text) FROM pg_class WHERE relkind = 'r'
    AND oid IN (SELECT relid FROM pg_partition_tree(:name) UNION SELECT CAST(:name AS regclass))
"""


def upgrade() -> None:
    for name in TABLES if on_postgres() else ():
        stored = op.get_bind().execute(text(SELECT_STORED), {"name": name}).scalars().all()
        run(*(f"ALTER TABLE {table} SET ({OPTION} = 0.01)" for table in stored))
