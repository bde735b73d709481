"""Adds two tables for workers that share work by ranges of users: sums of statistics, and the parts of a rebuild.

`bandit_ledger.changes` is no longer used. The column stays, so that processes of the previous release keep working.
"""

from app.migrations import run

revision = "0009"
down_revision = "0008"

TABLES = (
    # A range begins with `first_user` and ends before that of the next one. `evidence`, like in `bandit_states`, is the
    # sum over the range. It and its counts are NULL until the range is summed. `revision` counts how often it was.
    """CREATE TABLE pooled_ranges (
        spec_hash TEXT NOT NULL,
        first_user TEXT NOT NULL,
        claimed_at_ms INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        users INTEGER,
        decisions INTEGER,
        evidence BLOB,
        PRIMARY KEY (spec_hash, first_user)
    ) STRICT""",
    # Covers the queries for the next range, and for whether a sum has changed or is missing.
    "CREATE INDEX pooled_ranges_by_claim ON pooled_ranges (spec_hash, claimed_at_ms, revision, users)",
    # What a worker has claimed of a run: the users above `after_user`, up to `last_user`.
    """CREATE TABLE rebuild_parts (
        run_id TEXT NOT NULL,
        last_user TEXT NOT NULL,
        after_user TEXT NOT NULL,
        claimed_at_ms INTEGER NOT NULL,
        PRIMARY KEY (run_id, last_user)
    ) STRICT""",
    "DROP INDEX bandit_states_by_spec",
    # Also counts the users and decisions of a range.
    "CREATE INDEX bandit_states_by_spec ON bandit_states (spec_hash, user_id, decisions)",
)


def upgrade() -> None:
    run(*TABLES)
