"""What a program with the README's input makes of an older database: run by `test_added_input.py`, prints JSON."""

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.api.scoring import ScoreRequest
from app.bandit.decisions import DecisionRecord, shadow_of
from app.bandit.evaluation import policy_of
from app.bandit.model.inputs import NEWEST, SPECS, Context
from app.bandit.model.sufficient_statistics import SufficientStatistics
from app.bandit.model.thompson_sampling import CHALLENGER, Policies
from app.stores.sql.database import named_rows
from app.stores.sql.decision_rows import array, decision_of
from app.stores.sqlite.database import SqliteDatabase
from tests.support.bandit_process import BanditProcess, feedback_for
from tests.support.clock import FakeClock
from tests.support.learning_check import SELECT_DECISIONS
from tests.support.score_requests import s_of, tip


def shadows_of_old_decisions(rows: list[dict[str, Any]], priors: dict[int, bytes]) -> dict[str, float]:
    """Replay the log: the shadow of every old decision, compared with the one that the older program stored."""
    policies, learned = Policies(), dict[str, SufficientStatistics]()
    count, champion, challenger = 0, 0.0, 0.0
    for row in rows:  # in the order in which they were learned, and each before the user's next decision was made
        decision, zeros = decision_of(row), np.zeros(NEWEST.size)
        statistics = learned.get(decision.user_id, SufficientStatistics.none(NEWEST))
        assert statistics.decisions == decision.state_version
        mu = array(priors[row["prior_version"]]) if row["prior_version"] else zeros[:0]
        shadow = shadow_of(decision, statistics, np.append(mu, zeros[len(mu) :]), policies)
        count += 1
        champion += shadow["champion_pi"] != row["champion_pi"]
        assert isinstance(shadow["challenger_pi"], bytes)
        difference = np.abs(array(shadow["challenger_pi"]) - array(row["challenger_pi"])).max()
        challenger = max(challenger, float(difference))
        learned[decision.user_id] = statistics.learned(array(row["phi"]), row["reward"])
    return {"count": count, "champion_differs": champion, "challenger_differs": challenger}


async def _found(process: BanditProcess) -> dict[str, Any]:
    rows = await process.database.read(lambda connection: named_rows(connection, SELECT_DECISIONS, ()))
    priors = dict(await process.rows("SELECT version, mu FROM bandit_priors"))
    found: dict[str, Any] = {"old": shadows_of_old_decisions(rows, priors)}
    found["roles"] = sorted({(await process.decide(f"user-{number}")).role for number in range(10)})
    stage = (await process.bandit.rollout.state()).stage
    await process.bandit.rollout.watch()
    state = await process.bandit.rollout.state()
    found["stage"] = [stage, state.stage, state.share]
    before = await process.statistics()
    await process.bandit.maintenance.grow(math.inf)
    after = await process.statistics()
    found["grown"] = [
        before.spec.size,
        after.spec.size,
        bool((after.leading(before.spec.size)[0] == s_of(before)).all()),
    ]
    found["pooled"] = await process.pool()
    tips = (tip("short", effort_minutes=5.0), tip("long", effort_minutes=480.0), tip("unknown"))
    for _ in range(12):
        decision = await process.decide(candidates=tips, context=Context())
        await process.bandit.maintenance.shadow()
        action = "completed" if decision.chosen_id == "short" else "dismissed"
        at_ms = process.clock.now_ms()
        await process.consume(feedback_for(decision, at_ms, action, event_id=f"of {decision.id}"))
    # Nothing is known about this user, so all that tells the candidates apart is the pooled effect of the new input.
    await process.pool()
    weekend = msgspec.convert({"weekend": True}, Context)
    stranger = await process.decide("new", candidates=tips, context=weekend)
    await process.bandit.maintenance.shadow()
    shown, outcome = await process.bandit.scorer.explain(stranger.id)
    found["record"] = msgspec.to_builtins(DecisionRecord.of(shown, outcome))["context"]
    challenger = shown.shadow if shown.role == "champion" else shown.ranking
    assert challenger is not None
    found["scores"] = challenger.scores.tolist()
    found["efforts"] = [item.features.effort_minutes for item in shown.candidates]  # type: ignore[attr-defined]
    found["weekend"] = shown.context.weekend  # type: ignore[attr-defined]
    phi = NEWEST.phi(shown.candidates, shown.context, None)
    for name in ("effort", "weekend_x_effort"):
        found[name] = phi[:, NEWEST.names.index(name)].tolist()
    found["without_shadow"] = await process.stored("champion_pi IS NULL OR challenger_pi IS NULL")
    return found


async def _main(path: Path, now_ms: int) -> None:
    database = await SqliteDatabase.open(path, readers=1)
    process = BanditProcess(database, clock=FakeClock(now_ms), ids="later")
    try:
        found = await _found(process)
    finally:
        await process.close()
        await database.close()
    found["specs"] = {spec.version: spec.hash for spec in SPECS.values()}
    found["names"] = NEWEST.names
    found["challenger"] = CHALLENGER.id
    (path.parent / "policy.toml").write_text(f'id = "bolder"\nbase = "{CHALLENGER.id}"\n')
    found["evaluated"] = policy_of(str(path.parent / "policy.toml")).spec.version
    _, components = msgspec.json.schema_components([ScoreRequest])
    found["schema"] = components["CandidateFeatures"]
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
