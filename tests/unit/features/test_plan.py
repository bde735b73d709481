"""What changes between two registries, and whether it breaks consumers."""

from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from app.features.events import SERVED
from app.features.plan import Change, changes, definitions_of, feature_of
from app.features.registry import Registry
from tests.support.entries import entry
from tests.support.registry import REGISTRY

OTHER_SQL = "SELECT user_id, MAX(local_hour) AS value FROM views GROUP BY user_id"


def change(**fields: Any) -> Change | None:
    """What a new version of the entry changes."""
    before, after = [definitions_of(Registry([item])) for item in (entry(), entry(**fields))]
    found = changes(before, after)
    assert len(found) <= 1
    return found[0] if found else None


def test_nothing_changes_when_both_are_the_same() -> None:
    assert changes(definitions_of(REGISTRY), definitions_of(REGISTRY)) == []


def test_every_feature_is_added_when_none_was_served() -> None:
    found = changes((), definitions_of(REGISTRY))
    assert [item.feature for item in found] == list(REGISTRY.names)
    assert {(item.kind, item.breaks, item.recomputed) for item in found} == {("added", False, True)}


def test_removing_a_feature_breaks() -> None:
    left = Registry([item for item in REGISTRY if item.name != "preferred_hour"])
    found = changes(definitions_of(REGISTRY), definitions_of(left))
    assert found == [Change("preferred_hour", "removed", (), breaks=True, recomputed=False)]


@pytest.mark.parametrize(
    ("fields", "detail", "recomputed"),
    [
        ({"compute": OTHER_SQL}, "SQL", True),
        ({"window": timedelta(days=7)}, "window: 30 days → 7 days", True),
        ({"default": 0}, "default: null → 0", True),
        ({"ttl": timedelta(minutes=90)}, "TTL: 1 hour → 90 minutes", False),
        ({"ttl": timedelta(hours=1, milliseconds=1)}, "TTL: 1 hour → 3600.001 seconds", False),
        ({"description": "Another one."}, "description", False),
        ({"invalidated_by": (SERVED,)}, f"invalidated by: tip_feedback, tip_served → {SERVED}", False),
    ],
)
def test_change_lists_details_and_recomputation(fields: dict[str, Any], detail: str, recomputed: bool) -> None:
    found = change(**fields)
    assert found is not None
    if detail.startswith("invalidated by"):
        assert found.details[0].endswith(f"→ {SERVED}")
    else:
        assert found.details == (detail,)
    assert (found.kind, found.breaks, found.recomputed) == ("changed", False, recomputed)


def test_times_are_told_apart_to_the_millisecond() -> None:
    before, after = (definitions_of(Registry([entry(ttl=timedelta(milliseconds=ms))])) for ms in (3_600_001, 3_600_002))
    (found,) = changes(before, after)
    assert found.details == ("TTL: 3600.001 seconds → 3600.002 seconds",)


def test_every_feature_is_computed_again_after_another_cache_protocol() -> None:
    before = definitions_of(REGISTRY)
    after = [replace(item, fingerprint=f"{item.fingerprint}-of-another-protocol") for item in before]
    assert changes(before, after) == [
        Change(item.name, "changed", ("protocol of the cache",), breaks=False, recomputed=True) for item in before
    ]


def test_another_dtype_breaks() -> None:
    found = change(dtype="float")
    assert found == Change("probe", "changed", ("dtype: int → float",), breaks=True, recomputed=True)


def test_removed_features_come_last() -> None:
    before = definitions_of(Registry([entry(name="gone"), entry(name="kept"), entry(name="moved", default=1)]))
    after = definitions_of(Registry([entry(name="new"), entry(name="moved"), entry(name="kept")]))
    assert [(item.feature, item.kind) for item in changes(before, after)] == [
        ("new", "added"),
        ("moved", "changed"),
        ("gone", "removed"),
    ]


def test_announced_entry_is_the_same_feature_again() -> None:
    for item in REGISTRY:
        announced = feature_of(definitions_of(Registry([item]))[0])
        assert (announced.fingerprint, announced.ttl, announced.window) == (item.fingerprint, item.ttl, item.window)
