"""Adds a hash slot to each owed invalidation (a cache deletion that is still to be made), so that meanwhile the users
of all other slots still get cached values."""

from app.migrations import run

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    run(
        # -1 stands for all slots: rows of earlier releases.
        "ALTER TABLE owed_invalidations ADD COLUMN slot INTEGER NOT NULL DEFAULT -1",
        "CREATE INDEX owed_invalidations_by_slot ON owed_invalidations (slot)",
    )
