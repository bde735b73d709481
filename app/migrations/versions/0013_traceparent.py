"""Adds the traceparent of an event's request or job to the outbox, so that a worker continues the trace.

Revision ID: 0013
"""

from alembic import op
from sqlalchemy import text

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    collation = "" if op.get_context().dialect.name == "sqlite" else ' COLLATE "C"'
    # Null if traces are off; processes of an earlier release insert no value.
    op.execute(text(f"ALTER TABLE outbox ADD COLUMN traceparent TEXT{collation}"))


def downgrade() -> None:
    op.execute(text("ALTER TABLE outbox DROP COLUMN traceparent"))
