"""Makes event ids unique per user, and adds a column to decisions that records how their profile was read.

SQLite cannot drop a UNIQUE constraint, so the log is copied: about three seconds for each million events, in one
transaction. Processes of the previous release may keep running. During the migration their writes wait or answer 503,
and their reads continue. After it they still reject an event id that another user has used.
"""

from alembic import op
from alembic.util.exc import CommandError
from sqlalchemy import text

from app.migrations import on_postgres, run

revision = "0007"
down_revision = "0006"

UNIQUE = "event_id TEXT NOT NULL UNIQUE,"


def upgrade() -> None:
    if on_postgres():
        run("ALTER TABLE event_log DROP CONSTRAINT event_log_event_id_key")
    else:
        _copy_log()
    run(
        "CREATE UNIQUE INDEX event_log_by_id ON event_log (user_id, event_id)",
        # JSON: the moment of the read, and the fingerprint and version of each value.
        "ALTER TABLE tip_scores ADD COLUMN profile_read TEXT",
    )


def _copy_log() -> None:
    """Replace the log by a copy without the constraint. The copy continues the numbering of events, so that no sequence
    number is used again."""
    select = text("SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = 'event_log'")
    sql: str = op.get_bind().execute(select).scalar_one()
    if UNIQUE not in sql:
        raise CommandError(f"revision 0006 did not create event_log like this: it has no column {UNIQUE!r}")
    columns = sql[sql.index("(") :].replace(UNIQUE, "event_id TEXT NOT NULL,")
    run(
        f"CREATE TABLE new_log {columns}",
        "INSERT INTO new_log SELECT * FROM event_log ORDER BY seq",
        "DELETE FROM sqlite_sequence WHERE name = 'new_log'",
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'new_log', seq FROM sqlite_sequence WHERE name = 'event_log'",
        "DROP TABLE event_log",
        "ALTER TABLE new_log RENAME TO event_log",
        "CREATE INDEX event_log_by_user ON event_log (user_id, subject)",
        "CREATE INDEX event_log_by_time ON event_log (occurred_at_ms)",
        "CREATE INDEX event_log_unconsumed ON event_log (received_at_ms) WHERE consumed_at_ms IS NULL",
    )
