"""A short run of the torture, every kind of fault among it; and proof that it finds each fault that is built in."""

from __future__ import annotations

import pytest

from tests.support.servers import VALKEY, binary
from tests.torture.faults import FAULTS
from tests.torture.mutants import MUTANTS
from tests.torture.plan import draw_plan
from tests.torture.run import Config, torture

# Few users, and much hesitation between the steps of the protocol: what is rare becomes common.
CLOSE = {"users": 6, "clients": 8, "hesitate": "0.3:0.03", "rate_per_s": 2.0}


def test_plan_is_the_same_when_the_seed_is() -> None:
    faults = list(FAULTS)
    assert draw_plan(1, 60, faults, 1.0) == draw_plan(1, 60, faults, 1.0)
    assert draw_plan(1, 60, faults, 1.0) != draw_plan(2, 60, faults, 1.0)


def test_every_fault_has_its_turn_when_there_are_as_many_steps() -> None:
    plan = draw_plan(3, 600, list(FAULTS), 1.0)
    assert {step.fault for step in plan[: len(FAULTS)]} == set(FAULTS)


@pytest.fixture(autouse=True)
def _server() -> None:
    binary(VALKEY)  # without it these tests are skipped, and fail on CI


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_every_answer_is_explained_when_every_fault_happens() -> None:
    config = Config(seed=5, seconds=22.0, rate_per_s=2.4, clients=8, users=12, hesitate="0.1:0.02")
    assert {step.fault for step in config.plan()} == set(FAULTS)
    ledger = await torture(config)
    assert not ledger.violations, "\n\n".join(ledger.violations[:3])
    assert ledger.undecided == 0
    assert ledger.operations.total() > 1_000
    assert ledger.metrics["cache_hits_total"] > ledger.metrics["near_hits_total"] > 0, "the cache took no part"
    befell = {name for name in FAULTS if ledger.faults[name]}
    assert len(befell) >= len(FAULTS) - 2, f"missing: {set(FAULTS) - befell}"  # one may find its server down


@pytest.mark.slow
@pytest.mark.timeout(240)  # the run, and a start and an end on a machine that has far too much to do
@pytest.mark.parametrize("mutant", MUTANTS)
async def test_a_violation_is_found_when_the_service_is_a_mutant(mutant: str) -> None:
    by = {"open_gate": ["partition"], "no_hold_back": ["partition"], "constant_epoch": ["restart_old"]}
    ledger = await torture(
        Config(seed=7, seconds=60.0, faults=by.get(mutant, []), mutant=mutant, stop_at_first=True, **CLOSE)  # type: ignore[arg-type]
    )
    found = [text for text in ledger.violations if "no order explains it" in text]
    assert found, ledger.violations
    assert "<- this" in found[0], "what explains it is shown"
