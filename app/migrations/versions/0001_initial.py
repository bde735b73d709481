"""Creates the tables of events, cache invalidations, dead letters, rebuilds and the audit trail."""

import secrets

from app.migrations.statements import run

revision = "0001"
down_revision = None

TABLES = (
    """CREATE TABLE service (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT""",
    """CREATE TABLE event_log (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        event_id TEXT NOT NULL UNIQUE,
        subject TEXT NOT NULL,
        user_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        occurred_at_ms INTEGER NOT NULL,
        claimed_at_ms INTEGER,
        received_at_ms INTEGER NOT NULL,
        consumed_at_ms INTEGER,
        attempts INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    "CREATE INDEX event_log_by_user ON event_log (user_id, subject)",
    "CREATE INDEX event_log_by_time ON event_log (occurred_at_ms)",
    "CREATE INDEX event_log_unconsumed ON event_log (received_at_ms) WHERE consumed_at_ms IS NULL",
    """CREATE TABLE tip_views (
        seq INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL,
        tip_id TEXT NOT NULL,
        occurred_at_ms INTEGER NOT NULL,
        utc_offset_min INTEGER NOT NULL,
        received_at_ms INTEGER NOT NULL,
        decision_id TEXT
    ) STRICT""",
    "CREATE INDEX tip_views_covering ON tip_views (user_id, occurred_at_ms, received_at_ms, utc_offset_min)",
    """CREATE TABLE tip_feedback (
        seq INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL,
        tip_id TEXT NOT NULL,
        occurred_at_ms INTEGER NOT NULL,
        utc_offset_min INTEGER NOT NULL,
        received_at_ms INTEGER NOT NULL,
        decision_id TEXT,
        action TEXT NOT NULL CHECK (action IN ('completed', 'dismissed', 'snoozed')),
        dwell_ms INTEGER CHECK (dwell_ms BETWEEN 0 AND 86400000)
    ) STRICT""",
    """CREATE INDEX tip_feedback_covering
        ON tip_feedback (user_id, occurred_at_ms, received_at_ms, utc_offset_min, action, dwell_ms)""",
    """CREATE TABLE owed_invalidations (
        id INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, owed_at_ms INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE cache_registration (
        only INTEGER PRIMARY KEY CHECK (only = 1), server TEXT, generation INTEGER NOT NULL
    ) STRICT""",
    "INSERT INTO cache_registration (only, server, generation) VALUES (1, NULL, 0)",
    """CREATE TABLE feature_keys (
        subject TEXT NOT NULL, feature TEXT NOT NULL, announced_at_ms INTEGER NOT NULL,
        PRIMARY KEY (subject, feature)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE dead_letters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL CHECK (source IN ('queue', 'consumption')),
        payload TEXT NOT NULL,
        error TEXT NOT NULL,
        traceback TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        seq INTEGER UNIQUE,
        user_id TEXT,
        created_at_ms INTEGER NOT NULL,
        last_failed_at_ms INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX dead_letters_by_user ON dead_letters (user_id) WHERE user_id IS NOT NULL",
    """CREATE TABLE rebuilds (
        id TEXT PRIMARY KEY,
        scope TEXT NOT NULL,
        user_ids TEXT,
        features TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'cancelled', 'failed')),
        done INTEGER NOT NULL DEFAULT 0,
        total INTEGER NOT NULL,
        position TEXT NOT NULL DEFAULT '',
        requested_by TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL,
        started_at_ms INTEGER,
        touched_at_ms INTEGER NOT NULL,
        finished_at_ms INTEGER,
        error TEXT
    ) STRICT""",
    "CREATE UNIQUE INDEX rebuilds_one_per_scope ON rebuilds (scope) WHERE state IN ('queued', 'running')",
    """CREATE TABLE audit_trail (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at_ms INTEGER NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        subject TEXT NOT NULL,
        outcome TEXT NOT NULL
    ) STRICT""",
)


def upgrade() -> None:
    run(*TABLES)
    run("INSERT INTO service (name, value) VALUES ('database_id', :value)", value=secrets.token_hex(16))
