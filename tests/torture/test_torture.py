"""Short runs of each mode, and proof that each finds the faults that are built into the service."""

from typing import Any

import pytest

from tests.support.servers import VALKEY, binary
from tests.torture.config import MODES, Config
from tests.torture.faults import FAULTS
from tests.torture.mutants import MUTANTS
from tests.torture.plan import draw_plan
from tests.torture.run import torture
from tests.torture.soak import growth_mib

# Few users and many pauses between the steps of the protocol make rare interleavings frequent.
CLOSE: dict[str, Any] = {"users": 6, "clients": 8, "hesitate": "0.3:0.03", "rate_per_s": 2.0}
OF_OTHER_MODES = ("answer_before_commit", "leak", "standby_read", "one_generation")
KILLS = 12


def test_plan_is_the_same_when_the_seed_is() -> None:
    faults = list(FAULTS)
    assert draw_plan(1, 60, faults, 1.0) == draw_plan(1, 60, faults, 1.0)
    assert draw_plan(1, 60, faults, 1.0) != draw_plan(2, 60, faults, 1.0)


def test_plan_has_every_fault_before_it_repeats_one() -> None:
    plan = draw_plan(3, 600, list(FAULTS), 1.0)
    assert {step.fault for step in plan[: len(FAULTS)]} == set(FAULTS)


def test_growth_leaves_out_the_warm_up() -> None:
    times = [float(second) for second in range(30)]
    assert growth_mib(times, [min(60.0 + second, 70.0) for second in times]) == pytest.approx(0)
    assert growth_mib(times, [60.0 + second for second in times]) == pytest.approx(19)


@pytest.fixture(autouse=True)
def _server() -> None:
    binary(VALKEY)  # without it these tests are skipped, and fail on CI


@pytest.mark.slow
async def test_every_answer_is_explained_when_every_fault_happens() -> None:
    config = Config(seconds=22.0, rate_per_s=2.4, clients=8, users=12, hesitate="0.1:0.02")
    assert {step.fault for step in config.plan()} == set(FAULTS)
    run = await torture(config)
    assert not run.violations, "\n\n".join(run.violations[:3])
    assert run.undecided == 0
    assert run.operations.total() > 200
    assert run.metrics["cache_hits_total"] > run.metrics["near_hits_total"] > 0, "the cache took no part"
    happened = {name for name in FAULTS if run.faults[name]}
    assert len(happened) >= len(FAULTS) - 2, f"missing: {set(FAULTS) - happened}"  # one may find its server down


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [name for name in MUTANTS if name not in OF_OTHER_MODES])
async def test_violation_is_found_when_the_service_is_a_mutant(mutant: str) -> None:
    faults = {
        "open_gate": ["partition"],
        "no_hold_back": ["partition"],
        "constant_epoch": ["restart_old"],
        "future_unnoticed": ["clock_forward"],
    }
    config = Config(seed=7, seconds=300.0, faults=faults.get(mutant, []), mutant=mutant, stop_at_first=True, **CLOSE)
    run = await torture(config)
    found = [text for text in run.violations if "no order explains it" in text]
    assert found, run.violations
    assert "<- this" in found[0], "the unexplained answer is marked"


@pytest.mark.slow
async def test_acknowledged_events_are_stored_once_when_the_api_is_killed() -> None:
    run = await torture(Config(**{**MODES["durability"], "kills": KILLS, "rate_per_s": 1.5}))
    assert not run.violations, "\n\n".join(run.violations[:3])
    assert run.faults["api_killed"] >= KILLS
    assert run.unanswered["send"] >= KILLS / 2, "the kills came between requests"
    assert len(run.acknowledged) > 100


@pytest.mark.slow
async def test_durability_finds_lost_events_when_the_answer_comes_before_the_commit() -> None:
    run = await torture(Config(**{**MODES["durability"], "kills": 3, "mutant": "answer_before_commit"}))
    assert any("acknowledged events are lost" in text for text in run.violations), run.violations


@pytest.mark.slow
async def test_soak_finds_the_process_when_it_leaks() -> None:
    run = await torture(Config(**{**MODES["soak"], "seconds": 300.0, "operations": 3_000, "mutant": "leak"}))
    assert [text for text in run.violations if "the memory of serve 1 grew" in text], run.violations
