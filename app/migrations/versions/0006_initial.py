"""Creates the tables of revision 0006, the oldest one that this program can migrate."""

import secrets

from app.migrations import run

revision = "0006"
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
        attempts INTEGER NOT NULL DEFAULT 0,
        sent_by TEXT
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
        action TEXT NOT NULL,
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
    # `body`: the counts of a process over some seconds, as JSON. Kept for a little more than the hour that pages show.
    """CREATE TABLE samples (
        id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, process TEXT NOT NULL, body TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX samples_by_time ON samples (at_ms)",
    """CREATE TABLE component_states (
        component TEXT PRIMARY KEY, state TEXT NOT NULL, detail TEXT NOT NULL,
        since_ms INTEGER NOT NULL, seen_ms INTEGER NOT NULL
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
    # `evidence`: S and y of `app.bandit.model.sufficient_statistics`, without the prior, which belongs to the spec.
    """CREATE TABLE bandit_states (
        user_id TEXT PRIMARY KEY,
        spec_hash TEXT NOT NULL,
        evidence BLOB NOT NULL,
        decisions INTEGER NOT NULL,
        updated_at_ms INTEGER NOT NULL
    ) STRICT""",
    "CREATE INDEX bandit_states_by_spec ON bandit_states (spec_hash)",
    # `changes` counts transactions that learned or erased, `erasures` counts erased users. A process that has read data
    # of a user compares `erasures` to notice that the user may have been erased since.
    """CREATE TABLE bandit_ledger (
        only INTEGER PRIMARY KEY CHECK (only = 1), changes INTEGER NOT NULL, erasures INTEGER NOT NULL
    ) STRICT""",
    "INSERT INTO bandit_ledger (only, changes, erasures) VALUES (1, 0, 0)",
    # `changes`: the ledger's count when the prior was pooled.
    """CREATE TABLE bandit_priors (
        version INTEGER PRIMARY KEY AUTOINCREMENT,
        spec_hash TEXT NOT NULL,
        mu BLOB NOT NULL,
        users INTEGER NOT NULL,
        decisions INTEGER NOT NULL,
        changes INTEGER NOT NULL,
        created_at_ms INTEGER NOT NULL
    ) STRICT""",
    # Decisions, in the order in which they were made. The columns that evaluate a roll-out stand before the long ones,
    # so that reading them follows no overflow page. The columns of the other policy are NULL until its shadow is
    # stored, all in one statement. `champion_p` and `challenger_p` are the probabilities of the chosen candidate.
    # `agree`: both policies rank the same candidate first.
    """CREATE TABLE tip_scores (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        decision_id TEXT NOT NULL UNIQUE,
        request_id TEXT,
        user_id TEXT NOT NULL,
        created_at_ms INTEGER NOT NULL,
        explore INTEGER NOT NULL CHECK (explore IN (0, 1)),
        role TEXT NOT NULL CHECK (role IN ('champion', 'challenger')),
        served_by TEXT NOT NULL,
        policy_hash TEXT NOT NULL,
        spec_hash TEXT NOT NULL,
        state_version INTEGER NOT NULL,
        prior_version INTEGER NOT NULL,
        profile_origin TEXT NOT NULL CHECK (profile_origin IN ('request', 'service', 'absent')),
        profile_present INTEGER NOT NULL CHECK (profile_present IN (0, 1)),
        chosen INTEGER NOT NULL,
        chosen_id TEXT NOT NULL,
        elapsed_us INTEGER NOT NULL,
        state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'served', 'learned', 'expired')),
        served_at_ms INTEGER,
        reward REAL,
        reward_source TEXT CHECK (reward_source IN ('feedback', 'default')),
        action TEXT,
        settled_at_ms INTEGER,
        champion_p REAL,
        challenger_p REAL,
        agree INTEGER CHECK (agree IN (0, 1)),
        q_logged REAL,
        v_champion REAL,
        v_challenger REAL,
        theta BLOB NOT NULL,
        phi BLOB NOT NULL,
        champion_scores BLOB,
        champion_pi BLOB,
        challenger_scores BLOB,
        challenger_pi BLOB,
        request TEXT NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX tip_scores_by_request ON tip_scores (request_id) WHERE request_id IS NOT NULL",
    "CREATE INDEX tip_scores_by_user ON tip_scores (user_id)",
    "CREATE INDEX tip_scores_by_time ON tip_scores (created_at_ms)",
    # Finds the decision of an event without a decision id: the newest unsettled decision of its user and tip.
    "CREATE INDEX tip_scores_unsettled ON tip_scores (user_id, chosen_id) WHERE state IN ('open', 'served')",
    # The decisions that the sweep settles.
    "CREATE INDEX tip_scores_open ON tip_scores (created_at_ms) WHERE state = 'open'",
    "CREATE INDEX tip_scores_served ON tip_scores (served_at_ms) WHERE state = 'served'",
    # Finds the oldest unsettled decision. Newer ones wait to be evaluated.
    "CREATE INDEX tip_scores_pending ON tip_scores (number) WHERE state IN ('open', 'served')",
    # The decisions to evaluate, in order. Covers the queries that count them.
    """CREATE INDEX tip_scores_evaluated ON tip_scores (number, champion_p, role, state, explore)
        WHERE state = 'learned' AND explore = 1""",
    # Each event that concerned a decision, and its outcome. An event that is delivered again is found here. Otherwise,
    # a repeated event that names no decision would be attributed to the next older decision.
    """CREATE TABLE decision_events (
        seq INTEGER PRIMARY KEY,
        number INTEGER NOT NULL,
        outcome TEXT NOT NULL CHECK (outcome IN ('served', 'learned', 'repeated', 'late', 'other tip'))
    ) STRICT""",
    "CREATE INDEX decision_events_by_decision ON decision_events (number)",
    # The policy that serves. The challenger serves a `share` of the users. Decisions above `evaluated_after` count.
    """CREATE TABLE rollout (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        stage TEXT NOT NULL CHECK (stage IN ('shadow', 'ramp', 'promoted', 'rolled back')),
        share REAL NOT NULL CHECK (share BETWEEN 0 AND 1),
        reason TEXT NOT NULL,
        changed_by TEXT NOT NULL,
        changed_at_ms INTEGER NOT NULL,
        evaluated_after INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    "INSERT INTO rollout (only, stage, share, reason, changed_by, changed_at_ms) "
    "VALUES (1, 'shadow', 0, 'the challenger begins in the shadow', 'the service', 0)",
    """CREATE TABLE rollout_looks (
        number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, n INTEGER NOT NULL, body TEXT NOT NULL
    ) STRICT""",
    # `definitions` is the registry as JSON (`app.features.plan`).
    """CREATE TABLE registries (
        fingerprint TEXT PRIMARY KEY, definitions TEXT NOT NULL,
        first_seen_ms INTEGER NOT NULL, last_seen_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE disabled_features (
        feature TEXT PRIMARY KEY, disabled_by TEXT NOT NULL, reason TEXT NOT NULL, disabled_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    # Counts the events with an unknown `decision_id`, by sender.
    """CREATE TABLE unknown_decisions (
        sent_by TEXT PRIMARY KEY, events INTEGER NOT NULL, newest_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
)


def upgrade() -> None:
    run(*TABLES)
    for name, size in (("database_id", 16), ("session_secret", 32)):
        run("INSERT INTO service (name, value) VALUES (:name, :value)", name=name, value=secrets.token_hex(size))
