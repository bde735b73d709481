"""Moves unconsumed events to an outbox, so that the log is only appended to. PostgreSQL begins with this revision.

On SQLite, the log is rewritten: about a second for each million events. Processes of the previous release answer 503 to
writes afterwards, so stop or replace them.

On PostgreSQL, the tables that requests and events write to have unique keys that begin with `user_id`, so that they can
be partitioned by user.

Revision ID: 0008
"""

import secrets

from alembic import op
from alembic.util.exc import CommandError
from sqlalchemy import text

from app.migrations.statements import drop, run

revision = "0008"
down_revision = "0007"

# Finds the decisions whose shadow is missing, of one user or of all.
UNSHADOWED = """CREATE INDEX tip_scores_unshadowed ON tip_scores (spec_hash, user_id, number)
    WHERE champion_p IS NULL AND state IN ('open', 'served')"""
SQLITE = (
    # What no worker has consumed. `attempts` counts how often consuming the event has failed.
    """CREATE TABLE outbox (
        seq INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL,
        received_at_ms INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    "CREATE INDEX outbox_by_time ON outbox (received_at_ms)",
    "INSERT INTO outbox SELECT seq, user_id, received_at_ms, attempts FROM event_log WHERE consumed_at_ms IS NULL",
    "DROP INDEX event_log_unconsumed",
    "ALTER TABLE event_log DROP COLUMN consumed_at_ms",
    "ALTER TABLE event_log DROP COLUMN attempts",
    "ALTER TABLE decision_events RENAME TO old_events",
    """CREATE TABLE decision_events (
        seq INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        outcome TEXT NOT NULL CHECK (outcome IN ('served', 'learned', 'repeated', 'late', 'other tip'))
    ) STRICT""",
    """INSERT INTO decision_events
        SELECT seq, user_id, number, outcome FROM old_events JOIN tip_scores USING (number) ORDER BY seq""",
    "DROP TABLE old_events",
    "CREATE INDEX decision_events_by_decision ON decision_events (number)",
    "DROP INDEX tip_scores_by_request",
    "CREATE UNIQUE INDEX tip_scores_by_request ON tip_scores (user_id, request_id) WHERE request_id IS NOT NULL",
    UNSHADOWED,
)
SQLITE_BEFORE = (
    "DROP INDEX tip_scores_unshadowed",
    "DROP INDEX tip_scores_by_request",
    "CREATE UNIQUE INDEX tip_scores_by_request ON tip_scores (request_id) WHERE request_id IS NOT NULL",
    "ALTER TABLE decision_events DROP COLUMN user_id",
    """CREATE TABLE old_log (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        event_id TEXT NOT NULL,
        subject TEXT NOT NULL,
        user_id TEXT NOT NULL,
        digest BLOB NOT NULL,
        occurred_at_ms INTEGER NOT NULL,
        claimed_at_ms INTEGER,
        received_at_ms INTEGER NOT NULL,
        consumed_at_ms INTEGER,
        attempts INTEGER NOT NULL DEFAULT 0
    , sent_by TEXT) STRICT""",
    # When an event was consumed is not known any more.
    """INSERT INTO old_log
        SELECT seq, event_id, subject, log.user_id, digest, occurred_at_ms, claimed_at_ms, log.received_at_ms,
            CASE WHEN outbox.seq IS NULL THEN log.received_at_ms END, COALESCE(attempts, 0), sent_by
        FROM event_log AS log LEFT JOIN outbox USING (seq) ORDER BY seq""",
    "DELETE FROM sqlite_sequence WHERE name = 'old_log'",
    "INSERT INTO sqlite_sequence (name, seq) SELECT 'old_log', seq FROM sqlite_sequence WHERE name = 'event_log'",
    "DROP TABLE event_log",
    "ALTER TABLE old_log RENAME TO event_log",
    "CREATE INDEX event_log_by_user ON event_log (user_id, subject)",
    "CREATE INDEX event_log_by_time ON event_log (occurred_at_ms)",
    "CREATE INDEX event_log_unconsumed ON event_log (received_at_ms) WHERE consumed_at_ms IS NULL",
    "CREATE UNIQUE INDEX event_log_by_id ON event_log (user_id, event_id)",
    "DROP TABLE outbox",
)

# The same schema as on SQLite, except for the keys by user, `users` and the sequences. The earlier revisions explain
# the tables. ID stands for a column that numbers the rows.
POSTGRES = (
    "CREATE TABLE service (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # A write locks the rows of the users that it is about. Their number of versions is kept low by the free space.
    "CREATE TABLE users (user_id TEXT PRIMARY KEY) WITH (fillfactor = 80)",
    # Drawn after the user's row is locked, so that the numbers of a user rise in the order of the commits.
    "CREATE SEQUENCE event_seq",
    """CREATE TABLE event_log (
        seq BIGINT NOT NULL,
        event_id TEXT NOT NULL,
        subject TEXT NOT NULL,
        user_id TEXT NOT NULL,
        digest BYTEA NOT NULL,
        occurred_at_ms BIGINT NOT NULL,
        claimed_at_ms BIGINT,
        received_at_ms BIGINT NOT NULL,
        sent_by TEXT,
        PRIMARY KEY (user_id, seq)
    )""",
    "CREATE UNIQUE INDEX event_log_by_id ON event_log (user_id, event_id)",
    "CREATE INDEX event_log_by_user ON event_log (user_id, subject, seq)",
    "CREATE INDEX event_log_by_time ON event_log (occurred_at_ms)",
    # Finds the newest events of all users.
    "CREATE INDEX event_log_by_seq ON event_log (seq)",
    """CREATE TABLE outbox (
        seq BIGINT NOT NULL,
        user_id TEXT NOT NULL,
        received_at_ms BIGINT NOT NULL,
        attempts BIGINT NOT NULL DEFAULT 0,
        PRIMARY KEY (seq, user_id)
    )""",
    "CREATE INDEX outbox_by_time ON outbox (received_at_ms)",
    """CREATE TABLE tip_views (
        seq BIGINT NOT NULL,
        user_id TEXT NOT NULL,
        tip_id TEXT NOT NULL,
        occurred_at_ms BIGINT NOT NULL,
        utc_offset_min BIGINT NOT NULL,
        received_at_ms BIGINT NOT NULL,
        decision_id TEXT,
        PRIMARY KEY (user_id, seq)
    )""",
    "CREATE INDEX tip_views_covering ON tip_views (user_id, occurred_at_ms) INCLUDE (received_at_ms, utc_offset_min)",
    """CREATE TABLE tip_feedback (
        seq BIGINT NOT NULL,
        user_id TEXT NOT NULL,
        tip_id TEXT NOT NULL,
        occurred_at_ms BIGINT NOT NULL,
        utc_offset_min BIGINT NOT NULL,
        received_at_ms BIGINT NOT NULL,
        decision_id TEXT,
        action TEXT NOT NULL,
        dwell_ms BIGINT CHECK (dwell_ms BETWEEN 0 AND 86400000),
        PRIMARY KEY (user_id, seq)
    )""",
    """CREATE INDEX tip_feedback_covering ON tip_feedback (user_id, occurred_at_ms)
        INCLUDE (received_at_ms, utc_offset_min, action, dwell_ms)""",
    "CREATE TABLE owed_invalidations (id ID, user_id TEXT NOT NULL, owed_at_ms BIGINT NOT NULL)",
    """CREATE TABLE cache_registration (
        "only" BIGINT PRIMARY KEY CHECK ("only" = 1), server TEXT, generation BIGINT NOT NULL
    )""",
    'INSERT INTO cache_registration ("only", server, generation) VALUES (1, NULL, 0)',
    """CREATE TABLE feature_keys (
        subject TEXT NOT NULL, feature TEXT NOT NULL, announced_at_ms BIGINT NOT NULL, PRIMARY KEY (subject, feature)
    )""",
    """CREATE TABLE dead_letters (
        id ID,
        source TEXT NOT NULL CHECK (source IN ('queue', 'consumption')),
        payload TEXT NOT NULL,
        error TEXT NOT NULL,
        traceback TEXT NOT NULL,
        attempts BIGINT NOT NULL,
        seq BIGINT UNIQUE,
        user_id TEXT,
        created_at_ms BIGINT NOT NULL,
        last_failed_at_ms BIGINT NOT NULL
    )""",
    "CREATE INDEX dead_letters_by_user ON dead_letters (user_id) WHERE user_id IS NOT NULL",
    """CREATE TABLE rebuilds (
        id TEXT PRIMARY KEY,
        scope TEXT NOT NULL,
        user_ids TEXT,
        features TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'cancelled', 'failed')),
        done BIGINT NOT NULL DEFAULT 0,
        total BIGINT NOT NULL,
        position TEXT NOT NULL DEFAULT '',
        requested_by TEXT NOT NULL,
        created_at_ms BIGINT NOT NULL,
        started_at_ms BIGINT,
        touched_at_ms BIGINT NOT NULL,
        finished_at_ms BIGINT,
        error TEXT
    )""",
    "CREATE UNIQUE INDEX rebuilds_one_per_scope ON rebuilds (scope) WHERE state IN ('queued', 'running')",
    """CREATE TABLE audit_trail (
        id ID, at_ms BIGINT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
        outcome TEXT NOT NULL
    )""",
    "CREATE TABLE samples (id ID, at_ms BIGINT NOT NULL, process TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX samples_by_time ON samples (at_ms)",
    """CREATE TABLE component_states (
        component TEXT PRIMARY KEY, state TEXT NOT NULL, detail TEXT NOT NULL, since_ms BIGINT NOT NULL,
        seen_ms BIGINT NOT NULL
    )""",
    """CREATE TABLE quality_reports (
        id ID,
        state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'completed', 'failed')),
        requested_by TEXT NOT NULL,
        requested_at_ms BIGINT NOT NULL,
        started_at_ms BIGINT,
        touched_at_ms BIGINT NOT NULL,
        finished_at_ms BIGINT,
        done BIGINT NOT NULL DEFAULT 0,
        total BIGINT,
        body TEXT,
        error TEXT
    )""",
    """CREATE UNIQUE INDEX quality_reports_active ON quality_reports ((state IN ('queued', 'running')))
        WHERE state IN ('queued', 'running')""",
    "CREATE TABLE ended_sessions (session_id TEXT PRIMARY KEY, expires_at_ms BIGINT NOT NULL)",
    """CREATE TABLE bandit_states (
        user_id TEXT PRIMARY KEY, spec_hash TEXT NOT NULL, evidence BYTEA NOT NULL, decisions BIGINT NOT NULL,
        updated_at_ms BIGINT NOT NULL
    )""",
    "CREATE INDEX bandit_states_by_spec ON bandit_states (spec_hash)",
    """CREATE TABLE bandit_ledger (
        "only" BIGINT PRIMARY KEY CHECK ("only" = 1), changes BIGINT NOT NULL, erasures BIGINT NOT NULL
    )""",
    'INSERT INTO bandit_ledger ("only", changes, erasures) VALUES (1, 0, 0)',
    """CREATE TABLE bandit_priors (
        version ID, spec_hash TEXT NOT NULL, mu BYTEA NOT NULL, users BIGINT NOT NULL, decisions BIGINT NOT NULL,
        changes BIGINT NOT NULL, created_at_ms BIGINT NOT NULL
    )""",
    # Before version 17, a partitioned table cannot have an identity column.
    "CREATE SEQUENCE decision_number",
    """CREATE TABLE tip_scores (
        number BIGINT NOT NULL DEFAULT nextval('decision_number'),
        decision_id TEXT NOT NULL,
        request_id TEXT,
        user_id TEXT NOT NULL,
        created_at_ms BIGINT NOT NULL,
        explore BIGINT NOT NULL CHECK (explore IN (0, 1)),
        role TEXT NOT NULL CHECK (role IN ('champion', 'challenger')),
        served_by TEXT NOT NULL,
        policy_hash TEXT NOT NULL,
        spec_hash TEXT NOT NULL,
        state_version BIGINT NOT NULL,
        prior_version BIGINT NOT NULL,
        profile_origin TEXT NOT NULL CHECK (profile_origin IN ('request', 'service', 'absent')),
        profile_present BIGINT NOT NULL CHECK (profile_present IN (0, 1)),
        chosen BIGINT NOT NULL,
        chosen_id TEXT NOT NULL,
        elapsed_us BIGINT NOT NULL,
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'served', 'learned', 'expired')),
        served_at_ms BIGINT,
        reward DOUBLE PRECISION,
        reward_source TEXT CHECK (reward_source IN ('feedback', 'default')),
        action TEXT,
        settled_at_ms BIGINT,
        champion_p DOUBLE PRECISION,
        challenger_p DOUBLE PRECISION,
        agree BIGINT CHECK (agree IN (0, 1)),
        q_logged DOUBLE PRECISION,
        v_champion DOUBLE PRECISION,
        v_challenger DOUBLE PRECISION,
        theta BYTEA NOT NULL,
        phi BYTEA NOT NULL,
        champion_scores BYTEA,
        champion_pi BYTEA,
        challenger_scores BYTEA,
        challenger_pi BYTEA,
        request TEXT NOT NULL,
        profile_read TEXT,
        PRIMARY KEY (user_id, number),
        UNIQUE (user_id, decision_id)
    )""",
    "CREATE UNIQUE INDEX tip_scores_by_request ON tip_scores (user_id, request_id) WHERE request_id IS NOT NULL",
    "CREATE INDEX tip_scores_by_number ON tip_scores (number)",
    "CREATE INDEX tip_scores_by_id ON tip_scores (decision_id)",
    "CREATE INDEX tip_scores_by_time ON tip_scores (created_at_ms)",
    "CREATE INDEX tip_scores_unsettled ON tip_scores (user_id, chosen_id) WHERE state IN ('open', 'served')",
    "CREATE INDEX tip_scores_open ON tip_scores (created_at_ms) WHERE state = 'open'",
    "CREATE INDEX tip_scores_served ON tip_scores (served_at_ms) WHERE state = 'served'",
    "CREATE INDEX tip_scores_pending ON tip_scores (number) WHERE state IN ('open', 'served')",
    """CREATE INDEX tip_scores_evaluated ON tip_scores (number, champion_p, role, state, explore)
        WHERE state = 'learned' AND explore = 1""",
    UNSHADOWED,
    """CREATE TABLE decision_events (
        seq BIGINT NOT NULL,
        user_id TEXT NOT NULL,
        number BIGINT NOT NULL,
        outcome TEXT NOT NULL CHECK (outcome IN ('served', 'learned', 'repeated', 'late', 'other tip')),
        PRIMARY KEY (user_id, seq)
    )""",
    "CREATE INDEX decision_events_by_decision ON decision_events (number)",
    """CREATE TABLE rollout (
        "only" BIGINT PRIMARY KEY CHECK ("only" = 1),
        stage TEXT NOT NULL CHECK (stage IN ('shadow', 'ramp', 'promoted', 'rolled back')),
        share DOUBLE PRECISION NOT NULL CHECK (share BETWEEN 0 AND 1),
        reason TEXT NOT NULL,
        changed_by TEXT NOT NULL,
        changed_at_ms BIGINT NOT NULL,
        evaluated_after BIGINT NOT NULL DEFAULT 0
    )""",
    """INSERT INTO rollout ("only", stage, share, reason, changed_by, changed_at_ms)
        VALUES (1, 'shadow', 0, 'the challenger begins in the shadow', 'the service', 0)""",
    "CREATE TABLE rollout_looks (number ID, at_ms BIGINT NOT NULL, n BIGINT NOT NULL, body TEXT NOT NULL)",
    """CREATE TABLE registries (
        fingerprint TEXT PRIMARY KEY, definitions TEXT NOT NULL, first_seen_ms BIGINT NOT NULL,
        last_seen_ms BIGINT NOT NULL
    )""",
    """CREATE TABLE disabled_features (
        feature TEXT PRIMARY KEY, disabled_by TEXT NOT NULL, reason TEXT NOT NULL, disabled_at_ms BIGINT NOT NULL
    )""",
    "CREATE TABLE unknown_decisions (sent_by TEXT PRIMARY KEY, events BIGINT NOT NULL, newest_ms BIGINT NOT NULL)",
)


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        run(*SQLITE)
        return
    for statement in POSTGRES:
        # Text is compared by its bytes, as on SQLite, whatever the collation of the database.
        typed = statement.replace(" TEXT", ' TEXT COLLATE "C"').replace(
            " ID,", " BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,"
        )
        run(typed)
    insert = text("INSERT INTO service (name, value) VALUES (:name, :value)")
    op.execute(insert.bindparams(name="database_id", value=secrets.token_hex(16)))
    op.execute(insert.bindparams(name="session_secret", value=secrets.token_hex(32)))


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        repeated = text("SELECT request_id FROM tip_scores GROUP BY request_id HAVING COUNT(request_id) > 1 LIMIT 1")
        if (request_id := op.get_bind().execute(repeated).scalar()) is not None:
            raise CommandError(f"several users have a request {request_id!r}, which revision 0007 does not allow")
        run(*SQLITE_BEFORE)
        return
    drop(POSTGRES)
