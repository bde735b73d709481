"""Adds the sender of an event, and a table that counts events with an unknown `decision_id` by sender.

Revision ID: 0006
"""

from alembic import op
from sqlalchemy import text

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(text("ALTER TABLE event_log ADD COLUMN sent_by TEXT"))
    op.execute(
        text(
            """CREATE TABLE unknown_decisions (
                sent_by TEXT PRIMARY KEY, events INTEGER NOT NULL, newest_ms INTEGER NOT NULL
            ) STRICT, WITHOUT ROWID"""
        )
    )


def downgrade() -> None:
    op.execute(text("DROP TABLE unknown_decisions"))
    op.execute(text("ALTER TABLE event_log DROP COLUMN sent_by"))
