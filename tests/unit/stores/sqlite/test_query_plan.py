"""Statements that run often search an index, and sort only small results."""

import json
import re
from pathlib import Path

import pytest

from app.features.registry import Registry
from app.stores.sql import (
    decisions,
    event_log,
    learning,
    logged_profiles,
    rebuilds,
    retention,
    rollout,
    samples,
    shadows,
    sufficient_statistics,
    users,
)
from app.stores.sql.database import Parameters
from app.stores.sql.profile_statement import build
from app.stores.sqlite import event_log as sqlite_log
from app.stores.sqlite.features import DIALECT
from tests.support.database import query_plan
from tests.support.entries import entry
from tests.support.registry import REGISTRY
from tests.unit.stores.sqlite.test_migrations import AnyParameter, statements

COVERED = "SEARCH {table} USING COVERING INDEX {table}_covering (user_id=? AND occurred_at_ms>? AND occurred_at_ms<?)"
LIVE = COVERED.replace(" AND occurred_at_ms<?", "")
BY_USER = "SEARCH event_log USING COVERING INDEX event_log_by_user (user_id=? AND subject=?)"
UNBOUNDED = Registry(
    [
        entry(name="views_ever", compute="SELECT user_id, COUNT(*) AS value FROM views GROUP BY user_id"),
        entry(name="actions_ever", compute="SELECT user_id, COUNT(DISTINCT action) AS value FROM feedback"),
        entry(
            name="newest_hour",
            compute="SELECT user_id, local_hour AS value FROM feedback ORDER BY occurred_at_ms DESC LIMIT 1",
        ),
    ]
)


@pytest.mark.parametrize("statement", ["live", "past", "repeated"])
@pytest.mark.parametrize("registry", [REGISTRY, UNBOUNDED], ids=["service", "without bounds of its own"])
def test_profile_statement_searches_covering_indexes(database_path: Path, registry: Registry, statement: str) -> None:
    asked = json.dumps([["ann", registry.full_mask, None, None, None]])
    plan = query_plan(database_path, getattr(build(registry, DIALECT), statement), {"clock_ms": 0, "asked": asked})
    tables = [re.findall(r"\b(tip_views|tip_feedback|event_log)\b", line) for line in plan]
    reads = [(line, found[0]) for line, found in zip(plan, tables, strict=True) if found]
    seeks = {"live": 4, "past": 0, "repeated": 2}  # the version by subject, the oldest event by relation
    assert len(reads) == seeks[statement] + len(registry), "each feature reads one relation"
    for line, table in reads:
        of_table = LIVE if statement == "live" else COVERED
        assert line == BY_USER if table == "event_log" else of_table.format(table=table)


# Scans of arrays, of subqueries, of tables with one row, and of indexes that contain little.
SMALL_SCAN = re.compile(
    r"SCAN (.* VIRTUAL TABLE .*|.*CONSTANT ROWS?|found|newest|counted|bandit_ledger|rollout|\(subquery-\d+\)"
    r"|.* USING COVERING INDEX bandit_states_by_spec|rebuilds USING INDEX rebuilds_one_per_scope)"
)
SORTED = {
    "still closed",
    "samples lately",
    "users by prefix",
    "activity",
    "newest traced",
    "learned decisions",
    "open runs",
}
PAGE = {"after": 0, "until": 9, "limit": 9, "among": 9, "stage": 0, "since": 0, "challenger": "s"}
NEWEST = {"user": "user-77", "since": 0, "until": 9, "at_ms": 9, "number": 9, "limit": 9}
RANGE = {"spec": "s", "first": "a", "end": "b", "n": 9, "round": 1, "newest": 2}
SHADOW = dict.fromkeys(re.findall(r":(\w+)", shadows.UPDATE_SHADOW + shadows.INSERT_POOL))
STATEMENTS: dict[str, tuple[str, Parameters, str]] = {
    "unconsumed": (event_log.SELECT_UNCONSUMED, (0, 1), "outbox_by_time (received_at_ms<?)"),
    "unconsumed ahead": (event_log.SELECT_UNCONSUMED_AHEAD, (0, 1), "outbox_by_time (received_at_ms>?)"),
    "logged": (event_log.SELECT_LOGGED, ("[1]",), "SEARCH log USING INTEGER PRIMARY KEY"),
    "newest logged profiles": (
        logged_profiles.SELECT_NEWEST,
        {"after": 0, "before": 9, "limit": 9},
        "SEARCH tip_scores USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)",
    ),
    "logged profiles by id": (logged_profiles.SELECT_BY_IDS, ("[]",), "(decision_id=?)"),
    "prunable events": (event_log.SELECT_PRUNABLE, (0, 1), "INDEX event_log_by_time (occurred_at_ms<?)"),
    "known events": (sqlite_log.SELECT_KNOWN, ("[]",), "event_log_by_id (user_id=? AND event_id=?)"),
    "newest of users": (users.SELECT_NEWEST, ("[]", "[]"), "event_log_by_user (user_id=? AND subject=?)"),
    "eligible users": (
        users.SELECT_ELIGIBLE,
        {"after": "", "since": 0, "until": 9, "limit": 9},
        "event_log_by_id (user_id>?)",
    ),
    "users by prefix": (users.SELECT_BY_PREFIX, {"prefix": "a", "limit": 20}, "event_log_by_id (user_id>?)"),
    "activity": (
        users.SELECT_ACTIVITY,
        {"user": "ann", "until": 1, "days": 30},
        COVERED.format(table="tip_feedback"),
    ),
    "newest traced": (
        users.SELECT_NEWEST_TRACED,
        {"user": "ann", "limit": 50},
        "event_log_by_user (user_id=? AND subject=?)",
    ),
    "events of an erased user": (users.DELETE_EVENTS[3], {"user": "ann"}, "(user_id=?)"),
    "decision events of an erased user": (
        users.DELETE_DECISIONS[0],
        {"user": "ann"},
        "decision_events_by_decision (number=?)",
    ),
    "decisions of an erased user": (users.DELETE_DECISIONS[3], {"user": "ann"}, "tip_scores_by_user (user_id=?)"),
    "open runs": (rebuilds.SELECT_IDS, (), "SCAN rebuilds USING INDEX rebuilds_one_per_scope"),  # of open ones
    "old samples": (samples.DELETE_OLD_SAMPLES, {"oldest": 1, "newest": 2}, "samples_by_time (at_ms>?)"),
    "samples": (samples.SELECT_SAMPLES, (1,), "samples_by_time (at_ms>?)"),
    "samples lately": (samples.SELECT_LATELY, (1, 2), "samples_by_time (at_ms>? AND at_ms<?)"),
    "state": (sufficient_statistics.SELECT_STATE, ("u",), "(user_id=?)"),
    "versions": (decisions.SELECT_ERASURES_AND_VERSIONS, ('["u"]',), "(user_id=?)"),
    "states to grow": (learning.SELECT_TO_GROW, ("[]", 1), "bandit_states_by_spec (spec_hash=?)"),
    "states of a spec": (
        sufficient_statistics.SELECT_COUNTS,
        ("[]",),
        "COVERING INDEX bandit_states_by_spec (spec_hash=?)",
    ),
    "learned in a range": (
        sufficient_statistics.SELECT_LEARNED,
        RANGE,
        "COVERING INDEX bandit_states_by_spec (spec_hash=? AND user_id>? AND user_id<?)",
    ),
    "states in a range": (
        sufficient_statistics.SELECT_STATES_IN_RANGE,
        RANGE,
        "bandit_states_by_spec (spec_hash=? AND user_id>? AND user_id<?)",
    ),
    "user in a range": (sufficient_statistics.SELECT_NTH_USER, RANGE, "(user_id>? AND user_id<?)"),
    "due range": (sufficient_statistics.SELECT_DUE, RANGE, "pooled_ranges_by_claim (spec_hash=?)"),
    "end of a range": (sufficient_statistics.SELECT_END, RANGE, "(spec_hash=? AND first_user>?)"),
    "sum of an erased user": (
        users.UPDATE_ERASED_SUM,
        {"spec": "s", "user": "u", "lost": 0},
        "(spec_hash=? AND first_user<?)",
    ),
    "changes seen": (sufficient_statistics.SELECT_CHANGES_SEEN, {"spec": "s"}, "bandit_priors_by_spec (spec_hash=?)"),
    "first range": (sufficient_statistics.INSERT_FIRST_RANGE, {"spec": "s"}, "bandit_priors_by_spec (spec_hash=?)"),
    "newest version": (decisions.SELECT_COMMON, {"spec": "s"}, "bandit_priors_by_spec (spec_hash=?)"),
    "decision by request": (decisions.SELECT_BY_REQUEST, ("u", "r"), "(user_id=? AND request_id=?)"),
    "decision by id": (decisions.SELECT_BY_ID, ("d",), "(decision_id=?)"),
    "line of a decision": (decisions.SELECT_LINE, ("d",), "(decision_id=?)"),
    "newest decisions": (decisions.SELECT_NEWEST, NEWEST, "tip_scores_by_time (created_at_ms>? AND"),
    "newest decisions of a user": (decisions.SELECT_NEWEST_OF_USER, NEWEST, "(user_id=? AND rowid<?)"),
    "missing shadows": (
        shadows.SELECT_PAGE,
        {"spec": "s", "user": "u", "number": 1, "limit": 9},
        "tip_scores_unshadowed (spec_hash=? AND user_id>?)",
    ),
    "missing shadows of a user": (
        shadows.SELECT_OF_USER,
        {"spec": "s", "user": "u", "version": 1},
        "tip_scores_unshadowed (spec_hash=? AND user_id=?)",
    ),
    "shadow": (shadows.UPDATE_SHADOW, SHADOW, "INTEGER PRIMARY KEY (rowid=?)"),
    "shadow of the pool": (shadows.INSERT_POOL, SHADOW, "tip_scores USING INTEGER PRIMARY KEY (rowid=?)"),
    "prunable decisions": (retention.SELECT_PRUNABLE, (1, 1), "COVERING INDEX tip_scores_by_time"),
    "is unsettled": (learning.SELECT_IS_UNSETTLED, ("u", "t"), "(user_id=? AND chosen_id=?)"),
    "is decision": (learning.SELECT_IS_DECISION, ("d", "u"), "(decision_id=?)"),
    "named decision": (learning.SELECT_NAMED, {"decision": "d", "user": "u", "seq": 1}, "(decision_id=?)"),
    "newest decision": (
        learning.SELECT_NEWEST,
        {"user": "u", "tip": "t", "latest": 1, "seq": 1},
        "tip_scores_unsettled (user_id=? AND chosen_id=?)",
    ),
    "learned decisions": (learning.SELECT_LEARNED, ("u",), "tip_scores_by_user (user_id=?)"),
    "closed": (learning.SELECT_CLOSED, {"closed": 1, "known": "[]", "limit": 1}, "tip_scores_served (served_at_ms<?)"),
    "unserved": (learning.SELECT_UNSERVED, {"closed": 1, "limit": 1}, "tip_scores_open (created_at_ms<?)"),
    "still closed": (
        learning.SELECT_STILL_CLOSED,
        {"closed": 1, "known": "[]", "found": "[]"},
        "SEARCH decision USING INTEGER PRIMARY KEY (rowid=?)",
    ),
    "expired": (
        learning.UPDATE_EXPIRED,
        {"now": 1, "found": "[]"},
        "SEARCH event_log USING COVERING INDEX event_log_by_user (user_id=? AND subject=? AND rowid>?)",
    ),
    "counts": (rollout.SELECT_COUNTS, PAGE, "COVERING INDEX tip_scores_evaluated"),
    "page": (rollout.SELECT_PAGE, PAGE, "tip_scores_evaluated (number>? AND number<?)"),
    "shown": (rollout.SELECT_SHOWN, PAGE, "SEARCH tip_scores USING INTEGER PRIMARY KEY (rowid>?)"),
    "oldest unsettled": (rollout.SELECT_OLDEST_UNSETTLED, (0,), "tip_scores_pending (number>?)"),
    "first since": (rollout.SELECT_FIRST_SINCE, (0,), "COVERING INDEX tip_scores_by_time (created_at_ms>?)"),
    "newest prior": (rollout.SELECT_NEWEST_PRIOR, (), "INTEGER PRIMARY KEY (rowid=?)"),
    "recent": (rollout.SELECT_RECENT, PAGE, "tip_scores_by_time (created_at_ms>?)"),
}


def test_statement_searches_its_index(migrated_template: Path) -> None:
    for name, (sql, parameters, search) in STATEMENTS.items():
        plan = query_plan(migrated_template, sql, parameters)
        assert [line for line in plan if search in line], (name, plan)
        assert not [line for line in plan if line.startswith("SCAN") and not SMALL_SCAN.fullmatch(line)], name
        assert name in SORTED or not [line for line in plan if "TEMP B-TREE" in line], name


# Tables that grow with users, events, decisions or time, and the constants whose statements read them from end to end:
# parts of statements, those that stop early, and those of `profiles doctor --full` and `profiles evaluate`.
GROWING = re.compile(
    r"SCAN (log|event_log|tip_views|tip_feedback|tip_scores|decision_events|pool_shadows|bandit_states|samples"
    r"|audit_trail|owed_invalidations)\b"
)
WHOLE = {
    *("learning._DECISION", "decisions._LINES", "logged_profiles._SELECT"),
    *("users.SELECT_NEWEST_USERS", "cache_state.SELECT_OWED", "data_version.SELECT_NEWEST"),
    *("event_log.SELECT_FAULTS", "integrity_check.SELECT_FAULTS", "sufficient_statistics.SELECT_STATES"),
    "samples.SELECT_BACKLOG",
}


def test_only_known_statements_read_a_growing_table_from_end_to_end(migrated_template: Path) -> None:
    found = set()
    for name, sql in statements("sql", "sqlite"):
        parameters: AnyParameter | tuple[None, ...] = AnyParameter() if "?" not in sql else (None,) * sql.count("?")
        if any(GROWING.match(line) for line in query_plan(migrated_template, sql, parameters)):
            found.add(name)
    assert found == WHOLE
