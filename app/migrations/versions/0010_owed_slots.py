"""Adds the hash slot of the user to owed invalidations, so that reads of other users keep their cached values.

Revision ID: 0010
"""

from alembic import op
from sqlalchemy import text

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    integer = "INTEGER" if op.get_context().dialect.name == "sqlite" else "BIGINT"
    # -1 stands for all slots: rows of earlier releases.
    op.execute(text(f"ALTER TABLE owed_invalidations ADD COLUMN slot {integer} NOT NULL DEFAULT -1"))
    op.execute(text("CREATE INDEX owed_invalidations_by_slot ON owed_invalidations (slot)"))


def downgrade() -> None:
    op.execute(text("DROP INDEX owed_invalidations_by_slot"))
    op.execute(text("ALTER TABLE owed_invalidations DROP COLUMN slot"))
