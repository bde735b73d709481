"""Creates the tables of the admin pages: metric samples, component states, quality reports, signed-out sessions."""

import secrets

from app.migrations.statements import run

revision = "0002"
down_revision = "0001"

TABLES = (
    # `body`: the counts of a process over some seconds, as JSON. Kept for a little more than the hour that pages show.
    """CREATE TABLE samples (
        id INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        process TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX samples_by_time ON samples (at_ms)",
    """CREATE TABLE component_states (
        component TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        detail TEXT NOT NULL,
        since_ms INTEGER NOT NULL,
        seen_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE quality_reports (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed')),
        requested_by TEXT NOT NULL,
        requested_at_ms INTEGER NOT NULL,
        started_at_ms INTEGER,
        touched_at_ms INTEGER NOT NULL,
        finished_at_ms INTEGER,
        done INTEGER NOT NULL DEFAULT 0,
        total INTEGER,
        body TEXT,
        error TEXT
    ) STRICT""",
    # One active report at a time.
    "CREATE UNIQUE INDEX quality_reports_active ON quality_reports ((state IN ('queued', 'running'))) "
    "WHERE state IN ('queued', 'running')",
    # Sessions that were signed out of before they expired.
    """CREATE TABLE ended_sessions (
        session_id TEXT PRIMARY KEY, expires_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
)


def upgrade() -> None:
    run(*TABLES)
    run("INSERT INTO service (name, value) VALUES ('session_secret', :value)", value=secrets.token_hex(32))
