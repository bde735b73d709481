"""Creates the tables of scoring and learning: statistics of each user, pooled priors, decisions, the roll-out."""

from app.migrations.statements import run

revision = "0003"
down_revision = "0002"

TABLES = (
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
        action TEXT CHECK (action IN ('completed', 'dismissed', 'snoozed')),
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
        number INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        n INTEGER NOT NULL,
        body TEXT NOT NULL
    ) STRICT""",
)


def upgrade() -> None:
    run(*TABLES)
