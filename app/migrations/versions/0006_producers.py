"""Adds the sender of an event, and a table that counts events with an unknown `decision_id` by sender."""

from app.migrations.statements import run

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    run(
        "ALTER TABLE event_log ADD COLUMN sent_by TEXT",
        """CREATE TABLE unknown_decisions (
                sent_by TEXT PRIMARY KEY, events INTEGER NOT NULL, newest_ms INTEGER NOT NULL
            ) STRICT, WITHOUT ROWID""",
    )
