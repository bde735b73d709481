"""Examples of features run on an empty database, and each failure is described."""

from datetime import timedelta

import pytest

from app.features.definitions import REGISTRY as SERVICE
from app.features.examples import Example, ExampleEvent, feedback, served
from app.features.registry import Feature, Registry
from app.stores.sqlite.feature_examples import run_examples
from app.stores.sqlite.features import compile_registry
from tests.support.entries import ENDLESS, entry


async def failures(probe: Feature, timeout_s: float = 10.0) -> list[str]:
    (found,) = await run_examples(compile_registry(Registry([probe])), 1, timeout_s)
    assert found.examples == len(probe.examples)
    return found.failures


def expecting(value: object, *events: ExampleEvent, **fields: object) -> Feature:
    """An entry with one example."""
    examples = [Example(events=list(events), value=value)]  # type: ignore[arg-type]
    return entry(invalidated_by=(), examples=examples, **fields)


async def test_examples_of_the_service_hold() -> None:
    found = await run_examples(compile_registry(SERVICE), SERVICE.full_mask, 10.0)
    assert [item.feature for item in found] == list(SERVICE.names)
    assert all(item.examples and not item.failures for item in found)


async def test_only_features_in_the_mask_are_run() -> None:
    registry = compile_registry(SERVICE)
    found = await run_examples(registry, registry.mask(["tip_volume_30d"]), 10.0)
    assert [item.feature for item in found] == ["tip_volume_30d"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probe", "failure"),
    [
        (expecting(3, served(), served()), "example 1: expected 3, computed 2"),
        (expecting(None, served()), "example 1: expected None, computed 1"),
        (expecting(1), "example 1: expected 1, computed None"),
        (expecting(1, default=0), "example 1: expected 1, computed 0"),
        (expecting("x", served()), "example 1: the expected value 'x' is not of dtype int"),
        (expecting(1, served(), dtype="str"), "example 1: the SQL gave int 1 where str is declared"),
        (
            expecting(1, served(), compute="SELECT user_id, SUM(9223372036854775807) + 1 AS value FROM views"),
            "example 1: the SQL gave float",
        ),
        (expecting(1, feedback("laughed")), "example 1: an event is not allowed: Invalid enum value 'laughed'"),
        (expecting(1, served(ago=timedelta(hours=-1))), "example 1: an event is not allowed: "),
        (expecting(1, served(tip_id="")), "example 1: an event is not allowed: "),
    ],
)
async def test_failing_example_is_described(probe: Feature, failure: str) -> None:
    (found,) = await failures(probe)
    assert found.startswith(failure)


async def test_example_fails_when_the_sql_takes_too_long() -> None:
    (found,) = await failures(expecting(1, served(), compute=ENDLESS), timeout_s=0.05)
    assert found == "example 1: the SQL took longer than 50 ms for one user"


async def test_all_failing_examples_are_named() -> None:
    examples = [Example(events=[served()] * count, value=2) for count in (1, 2, 3)]
    assert await failures(entry(invalidated_by=(), examples=examples)) == [
        "example 1: expected 2, computed 1",
        "example 3: expected 2, computed 3",
    ]


@pytest.mark.parametrize(
    ("dtype", "tips", "value"), [("float", 1, 1), ("int", 2, 2.0), ("int", 0, 0), ("int", 0, None), ("float", 0, None)]
)
async def test_example_holds_when_its_value_converts_to_the_dtype(dtype: str, tips: int, value: float | None) -> None:
    examples = [Example(events=[served()] * tips, value=value)]
    assert await failures(entry(invalidated_by=(), dtype=dtype, default=0, examples=examples)) == []
