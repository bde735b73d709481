"""Adds the traceparent of an event's request or job to the outbox, so that a worker continues the trace."""

from app.migrations import run

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    # Null if traces are off; processes of an earlier release insert no value.
    run("ALTER TABLE outbox ADD COLUMN traceparent TEXT")
