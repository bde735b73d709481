"""`profiles evaluate`: the figures of policies that ran are those of the roll-out; others are computed from the log."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from app.bandit.decisions import Decision, ScoringRequest
from app.bandit.model.inputs import NUMBER_BYTES, SPEC_V1, Context
from app.bootstrap.service import open_service
from app.cli.bandit import feature_values
from app.features.clock import DAY_MS, rfc3339
from app.features.contract import import_registry
from app.settings import Settings
from tests.integration.cli.conftest import Run, write_events
from tests.support.clock import FakeClock
from tests.support.database import copy_database
from tests.support.events import feedback, payload
from tests.support.lived_decisions import write_log
from tests.support.readme import Reader, sections
from tests.support.registry import FEATURES
from tests.support.score_requests import tip
from tests.support.traffic import now_ms

pytestmark = pytest.mark.slow

FILE = """
from datetime import timedelta

from app.features.registry import Feature, Registry

REGISTRY = Registry([
    Feature(
        name="feature",
        dtype="{dtype}",
        ttl=timedelta(hours=1),
        window=timedelta(days=30),
        description="A feature that is being evaluated.",
        compute="SELECT user_id, {value} AS value FROM feedback GROUP BY user_id",
    ),
])
"""
POLICY = """
id = "lints-v3"
base = "lints-v2"
v = {v}

[[inputs]]
name = "volume_x_hour"
candidate = "{candidate}"
shared = "{shared}"
precision = 100.0
"""


async def _write(path: Path, decisions: int) -> Path:
    clock = FakeClock((now_ms() // DAY_MS - 2) * DAY_MS)  # at midnight, so that the hours do not depend on the test
    await write_log(path, decisions, clock=clock)
    return path


@pytest.fixture(scope="module")
def log(migrated_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy_database(migrated_template, tmp_path_factory.mktemp("evaluate") / "profiles.db", "log")
    return asyncio.run(_write(path, 400))


def rows(log: Path, statement: str) -> list[Any]:
    with closing(sqlite3.connect(log)) as connection:
        return connection.execute(statement).fetchall()


def figures(profiles: Run, log: Path, *arguments: str) -> Any:
    shown = profiles("evaluate", "--json", *arguments, database=log)
    assert shown.code == 0, shown.err
    return shown.json


@pytest.mark.parametrize(("policy", "role"), [("lints-v1", "champion"), ("lints-v2", "challenger")])
def test_policy_that_ran_has_the_figures_of_its_shadows(profiles: Run, log: Path, policy: str, role: str) -> None:
    found = figures(profiles, log, "--policy", policy)
    assert list(found) == ["decisions", "ess", "ips", "snips", "dr"]
    assert {tuple(found[name]) for name in ("ips", "snips", "dr")} == {("value", "low", "high")}
    reward, pi, pi_b, q, value = np.array(
        rows(log, f"SELECT reward, {role}_p, champion_p, q_logged, v_{role} FROM tip_scores WHERE state = 'learned'")
    ).T
    weight = pi / pi_b
    assert found["decisions"] == len(weight) == 400
    assert found["ess"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert found["ips"]["value"] == pytest.approx((weight * reward).mean())
    assert found["snips"]["value"] == pytest.approx((weight * reward).sum() / weight.sum())
    assert found["dr"]["value"] == pytest.approx((value + weight * (reward - q)).mean())
    assert all(found[name]["low"] < found[name]["value"] < found[name]["high"] for name in ("ips", "snips", "dr"))


def test_unsettled_decision_holds_back_newer_ones(profiles: Run, log: Path, tmp_path: Path) -> None:
    held = copy_database(log, tmp_path / "held.db", "held")
    with closing(sqlite3.connect(held)) as connection, connection:
        connection.execute("UPDATE tip_scores SET state = 'open', reward = NULL WHERE number = 251")
    assert figures(profiles, held, "--policy", "lints-v2")["decisions"] == 250
    with closing(sqlite3.connect(held)) as connection, connection:
        connection.execute("UPDATE rollout SET evaluated_after = 300")
    assert figures(profiles, held, "--policy", "lints-v2")["decisions"] == 250, "wherever the roll-out began"
    ((at_ms,),) = rows(log, "SELECT created_at_ms FROM tip_scores WHERE number = 301")
    assert figures(profiles, log, "--policy", "lints-v2", "--since", rfc3339(at_ms))["decisions"] == 100


def test_users_with_damaged_statistics_are_left_out_with_a_warning(profiles: Run, log: Path, tmp_path: Path) -> None:
    damaged = copy_database(log, tmp_path / "damaged.db", "damaged")
    with closing(sqlite3.connect(damaged)) as connection, connection:
        connection.execute("UPDATE bandit_states SET decisions = 1 WHERE user_id = 'user-3'")
    ((count,),) = rows(log, "SELECT COUNT(*) FROM tip_scores WHERE user_id = 'user-3'")
    shown = profiles("evaluate", "--policy", "lints-v2", "--json", database=damaged)
    assert (shown.code, shown.json["decisions"]) == (0, 400 - count)
    assert f"warning: {count} decisions are left out" in shown.err


def test_priors_come_from_the_log_when_the_recorded_ones_are_of_an_earlier_spec(
    profiles: Run, log: Path, tmp_path: Path
) -> None:
    earlier = copy_database(log, tmp_path / "earlier.db", "earlier")
    with closing(sqlite3.connect(earlier)) as connection, connection:
        connection.execute(
            "UPDATE bandit_priors SET spec_hash = ?, mu = substr(mu, 1, ?)", (SPEC_V1.hash, SPEC_V1.size * NUMBER_BYTES)
        )
    found, expected = (figures(profiles, path, "--policy", "lints-v2") for path in (earlier, log))
    for name in ("ips", "snips"):  # the reward model of the doubly robust estimate is the recorded prior
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-6)


def test_other_policies_are_replayed(profiles: Run, log: Path, tmp_path: Path) -> None:
    (tmp_path / "v3.toml").write_text(POLICY.format(v=0.2, candidate="priority", shared="volume"))
    (tmp_path / "same.toml").write_text('id = "same"\nbase = "lints-v2"\n')
    second = figures(profiles, log, "--policy", "lints-v2")
    assert figures(profiles, log, "--policy", "same.toml") == second
    others = [
        figures(profiles, log, "--policy", *arguments)
        for arguments in (
            ("v3.toml",),
            ("lints-v2", "--without-profile"),
            ("lints-v2", "--v", "0.01"),
            ("lints-v1+pool",),
            ("lints-v1",),
        )
    ]
    values = [found["dr"]["value"] for found in (second, *others)]
    assert len({*values}) == len(values)
    # Less exploration is further from what was logged.
    assert others[2]["ess"] < second["ess"]


def test_picture_and_text_have_the_figures(profiles: Run, log: Path, tmp_path: Path) -> None:
    shown = profiles("evaluate", "--policy", "lints-v2", "--picture", "x.svg", database=log)
    assert shown.code == 0, shown.err
    found = figures(profiles, log, "--policy", "lints-v2")
    assert f"lints-v2: 400 decisions of 20 users, effective sample size {found['ess']:,.0f}" in shown.out
    texts = [item.text or "" for item in ET.fromstring((tmp_path / "x.svg").read_text()).iter()]
    interval = "{value:.4f} ({low:.4f} to {high:.4f})".format(**found["dr"])
    assert interval in texts
    assert "{value:+.4f} ({low:+.4f} to {high:+.4f})".format(**found["dr"]) in shown.out
    counts = [int(text.split()[0]) for text in texts if "decisions: score" in text]
    assert sum(counts) == 400


def test_picture_that_cannot_be_written_is_named(profiles: Run, log: Path) -> None:
    shown = profiles("evaluate", "--policy", "lints-v2", "--picture", "no/such/x.svg", database=log)
    assert (shown.code, "cannot write no/such/x.svg: No such file" in shown.err) == (4, True), shown.err
    assert "Traceback" not in shown.err


def test_no_picture_is_left_when_the_evaluation_fails(profiles: Run, log: Path, tmp_path: Path) -> None:
    arguments = ("--policy", "lints-v2", "--since", "2900-01-01T00:00:00Z", "--picture", "x.svg")
    assert profiles("evaluate", *arguments, database=log).code == 5
    assert not list(tmp_path.glob("x.svg*"))


def test_mistake_is_found_before_the_feature_is_computed(profiles: Run, log: Path, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(FILE.format(dtype="int", value="COUNT(*) + 0.5"))  # computing it fails
    for arguments, message in (
        (("--policy", "lints-v1"), "lints-v1 has no pooled prior"),
        (("--policy", "lints-v1+pool", "--picture", "no/such/x.svg"), "cannot write no/such/x.svg"),
    ):
        shown = profiles("evaluate", *arguments, "--with-feature", "half.py", database=log)
        assert message in shown.err, shown.err


def test_feature_that_tells_users_apart_has_a_lift_and_another_has_none(
    profiles: Run, migrated_template: Path, tmp_path: Path
) -> None:
    log = asyncio.run(_write(copy_database(migrated_template, tmp_path / "long.db", "long"), 800))
    lifts = {}
    for name, value in (("useful", "AVG(dwell_ms)"), ("useless", "CAST(LENGTH(user_id) AS DOUBLE PRECISION)")):
        (tmp_path / f"{name}.py").write_text(FILE.format(dtype="float", value=value))
        found = figures(profiles, log, "--policy", "lints-v1+pool", "--with-feature", f"{name}.py")
        assert list(found) == ["decisions", "ess", "ips", "snips", "dr", "lift"]
        assert found["decisions"] == 800
        lifts[name] = found["lift"]
    assert lifts["useful"]["low"] > 0
    assert lifts["useless"]["low"] < 0.005
    assert lifts["useful"]["value"] > 3 * abs(lifts["useless"]["value"])


def test_feature_sees_only_what_each_decision_could_see(profiles: Run, log: Path, tmp_path: Path) -> None:
    database = copy_database(log, tmp_path / "more.db", "more")
    (tmp_path / "count.py").write_text(FILE.format(dtype="int", value="COUNT(*)"))

    async def decide() -> Decision:
        async with open_service(Settings(database=database, features=FEATURES), door="command") as service:
            asked = ScoringRequest(user_id="user-0", candidates=(tip("tip", False, 1, 1),), context=Context())
            return await service.bandit.scorer.score(asked)

    async def values() -> dict[int, float]:
        async with open_service(Settings(database=database, features=FEATURES), door="command") as service:
            registry, _ = import_registry(f"{tmp_path / 'count.py'}:REGISTRY", "test")
            return await feature_values(service, registry)

    made = asyncio.run(decide())  # it records the versions of the values; those of the log do not
    late = payload(feedback("user-0", made.created_at_ms - 3_600_000))
    assert profiles("events", write_events(tmp_path / "late.ndjson", late), database=database).code == 0
    found, seen, counts = asyncio.run(values()), dict[int, int](), Counter[str]()
    for number, user in rows(database, "SELECT number, user_id FROM tip_scores ORDER BY number"):
        seen[number] = counts[user]
        counts[user] += 1
    assert len(seen) == 401
    known = sorted(count for count in seen.values() if count)  # the first decision of a user has no value
    for number, count in seen.items():
        rank = (np.searchsorted(known, count) + np.searchsorted(known, count, side="right")) / len(known) - 1
        assert found[number] == (pytest.approx(rank) if count else 0)


def test_feature_whose_value_is_not_of_its_dtype_is_named(profiles: Run, log: Path, tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(FILE.format(dtype="int", value="COUNT(*) + 0.5"))
    shown = profiles("evaluate", "--policy", "lints-v1+pool", "--with-feature", "half.py", database=log)
    assert (shown.code, "feature 'feature': the SQL" in shown.err) == (2, True), shown.err


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (
        ("--policy", "lints-v9"),
        "--policy: lints-v9 is not one of lints-v1, lints-v2, lints-v1+pool, and not a file",
    ),
    (("--policy", "bad.toml"), "bad.toml is not one of"),
    (("--policy", "bad.toml"), "Object contains unknown field `draws`"),
    (("--policy", "base.toml"), "base must be one of lints-v1, lints-v2, lints-v1+pool, not 'lints-v9'"),
    (
        ("--policy", "factor.toml"),
        "candidate must be one of one, is_overdue, task_age, priority, not 'age' - at `$.inputs[0]`",
    ),
    (("--policy", "line.toml"), r"not 'priority\n' - at `$.inputs[0]`"),
    (("--policy", "evaluated.toml"), "hour_distance_sin, not 'evaluated' - at `$.inputs[0]`"),
    (("--policy", "v.toml"), "Expected `float` > 0.0 - at `$.v`"),
    (("--policy", "endless.toml"), "Expected `float` <= 1000.0 - at `$.v`"),
    (("--policy", "precision.toml"), "Expected `float` <= 1000000000000.0 - at `$.inputs[0].precision`"),
    (("--policy", "lints-v1", "--with-feature", "number.py"), "--policy: lints-v1 has no pooled prior"),
    (("--policy", "lints-v1", "--with-feature", "text.py"), "REGISTRY: must have one feature, a number"),
    (("--policy", "lints-v1", "--since", "2900-01-01T00:00:00Z"), "no decision of the period can be evaluated: "),
]


def test_mistake_is_named(profiles: Run, log: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('id = "x"\nbase = "lints-v1"\ndraws = 5\n')
    (tmp_path / "base.toml").write_text('id = "x"\nbase = "lints-v9"\n')
    policy = functools.partial(POLICY.format, v=0.2, candidate="priority", shared="volume")
    (tmp_path / "factor.toml").write_text(policy(candidate="age"))
    (tmp_path / "line.toml").write_text(policy(candidate="priority\\n"))
    (tmp_path / "evaluated.toml").write_text(policy(shared="evaluated"))
    (tmp_path / "v.toml").write_text(policy(v=-1.0))
    (tmp_path / "endless.toml").write_text(policy(v="inf"))
    (tmp_path / "precision.toml").write_text(policy().replace("precision = 100.0", "precision = inf"))
    (tmp_path / "text.py").write_text(FILE.format(dtype="str", value="MAX(action)"))
    (tmp_path / "number.py").write_text(FILE.format(dtype="int", value="COUNT(*)"))
    for arguments, message in MISTAKES:
        shown = profiles("evaluate", *arguments, database=log)
        assert (shown.code, message in shown.err) == (5, True), shown.err


@pytest.mark.parametrize("scale", ["nan", "inf", "1e308", "0", "-1"])
def test_policy_is_not_evaluated_when_v_is_out_of_range(profiles: Run, log: Path, scale: str) -> None:
    shown = profiles("evaluate", "--policy", "lints-v2", "--v", scale, database=log)
    assert (shown.code, "must be greater than 0 and at most 1,000" in shown.err) == (2, True), shown.err


def test_readme_evaluates_policies(log: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.environment |= {"PROFILES_DATABASE": str(log), "PROFILES_FEATURES": FEATURES}
    printed = reader.follow(sections()["app/bandit/README.md: Evaluating a policy"])
    for name in ("lints-v2", "lints-v1+pool+mean_dwell_7d"):
        assert f"{name}: 400 decisions of 20 users" in printed
    assert (tmp_path / "evaluation.svg").exists()
