"""Makes event ids unique per user, and adds to decisions how their profile was read.

SQLite cannot drop a UNIQUE constraint, so the log is copied: about a minute for each ten million events, in one
transaction. Processes of the previous release may stay open. Meanwhile, their writes wait or answer 503, and their
reads continue. Afterwards they still reject an event id that another user has used.

Revision ID: 0007
"""

from alembic import op
from alembic.util.exc import CommandError
from sqlalchemy import text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

COLUMNS = """seq, event_id, subject, user_id, digest, occurred_at_ms, claimed_at_ms, received_at_ms, consumed_at_ms,
    attempts, sent_by"""
INDEXES = (
    "CREATE INDEX event_log_by_user ON event_log (user_id, subject)",
    "CREATE INDEX event_log_by_time ON event_log (occurred_at_ms)",
    "CREATE INDEX event_log_unconsumed ON event_log (received_at_ms) WHERE consumed_at_ms IS NULL",
)


def upgrade() -> None:
    _copy(event_id="TEXT NOT NULL")
    op.execute(text("CREATE UNIQUE INDEX event_log_by_id ON event_log (user_id, event_id)"))
    # JSON: the moment of the read, and the fingerprint and version of each value.
    op.execute(text("ALTER TABLE tip_scores ADD COLUMN profile_read TEXT"))


def downgrade() -> None:
    repeated = text("SELECT event_id FROM event_log GROUP BY event_id HAVING COUNT(*) > 1 LIMIT 1")
    if (event_id := op.get_bind().execute(repeated).scalar()) is not None:
        raise CommandError(f"several users have an event {event_id!r}, which revision 0006 does not allow")
    op.execute(text("ALTER TABLE tip_scores DROP COLUMN profile_read"))
    op.execute(text("DROP INDEX event_log_by_id"))
    _copy(event_id="TEXT NOT NULL UNIQUE")


def _copy(event_id: str) -> None:
    """Replace the log by a copy with another definition of the column `event_id`. The copy keeps the sequence, so that
    no number is used again."""
    statements = (
        f"""CREATE TABLE new_log (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            event_id {event_id},
            subject TEXT NOT NULL,
            user_id TEXT NOT NULL,
            digest BLOB NOT NULL,
            occurred_at_ms INTEGER NOT NULL,
            claimed_at_ms INTEGER,
            received_at_ms INTEGER NOT NULL,
            consumed_at_ms INTEGER,
            attempts INTEGER NOT NULL DEFAULT 0,
            sent_by TEXT
        ) STRICT""",
        f"INSERT INTO new_log ({COLUMNS}) SELECT {COLUMNS} FROM event_log ORDER BY seq",  # noqa: S608  # constants
        "DELETE FROM sqlite_sequence WHERE name = 'new_log'",
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'new_log', seq FROM sqlite_sequence WHERE name = 'event_log'",
        "DROP TABLE event_log",
        "ALTER TABLE new_log RENAME TO event_log",
        *INDEXES,
    )
    for statement in statements:
        op.execute(text(statement))
