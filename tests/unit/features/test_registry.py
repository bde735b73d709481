"""The rules of the registry that need no database: one test for each."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.errors import RegistryError, UnknownFeature
from app.features.clock import DAY_MS
from app.features.definitions import REGISTRY as OURS
from app.features.events import FEEDBACK, KNOWN_SUBJECTS, SERVED
from app.features.registry import Dtype, Registry, Scalar, as_dtype, indices
from tests.support.entries import COUNT_VIEWS, entry
from tests.support.registry import REGISTRY


def refusal(**changes: object) -> str:
    """The message with which a registry of one entry, changed so, is refused."""
    with pytest.raises(RegistryError) as caught:
        Registry([entry(**changes)])
    message = str(caught.value)
    assert repr(str(changes.get("name", "probe"))) in message
    return message


def test_registry_is_refused_when_a_name_repeats() -> None:
    with pytest.raises(RegistryError, match=r"'twice'.*repeats"):
        Registry([entry(name="twice"), entry(name="once"), entry(name="twice")])


REFUSED: dict[str, list[dict[str, object]]] = {
    "identifier": [
        {"name": name} for name in ("", "7up", "with space", "with-dash", "a.b", "größe", "class", "a,b", "a/b")
    ],
    "unknown dtype 'decimal'; allowed are float, int, str": [{"dtype": "decimal"}],
    "TTL must be positive": [
        {"ttl": ttl} for ttl in (timedelta(0), timedelta(seconds=-1), timedelta(microseconds=999))
    ],
    "window must be positive": [{"window": timedelta(0)}],
    "description is empty": [{"description": ""}, {"description": " \n\t"}],
    "invalidated_by must be a tuple of subjects": [{"invalidated_by": SERVED}, {"invalidated_by": [SERVED]}],
    "is not of dtype float": [
        {"dtype": "float", "default": default} for default in (float("nan"), float("inf"), "0", False)
    ],
    "is not of dtype int": [
        {"dtype": "int", "default": default} for default in (0.5, True, "0", object(), 1 << 63, -(1 << 63) - 1)
    ],
    "is not of dtype str": [{"dtype": "str", "default": default} for default in (0, b"none")],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_registry_is_refused_when_an_entry_breaks_a_rule(reason: str) -> None:
    for changes in REFUSED[reason]:
        assert reason in refusal(**changes), changes


def test_registry_is_refused_when_a_subject_is_unknown() -> None:
    message = refusal(invalidated_by=(SERVED, "signals.tip.opened"))
    assert "'signals.tip.opened'" in message
    assert all(subject in message for subject in KNOWN_SUBJECTS)


@pytest.mark.parametrize(
    "changes",
    [{"ttl": 3600}, {"window": 30}, {"compute": None}, {"description": 7}, {"name": 7}, {"name": Path("probe")}],
)
def test_registry_is_refused_when_a_field_is_of_another_type(changes: dict[str, object]) -> None:
    refusal(**changes)


@pytest.mark.parametrize("item", ["probe", None, {"name": "probe"}])
def test_registry_is_refused_when_an_entry_is_no_feature(item: Any) -> None:
    with pytest.raises(RegistryError, match="an entry must be a Feature"):
        Registry([item])


@pytest.mark.parametrize(("dtype", "given", "kept"), [("float", 0, 0.0), ("int", 3.0, 3), ("str", "x", "x")])
def test_default_is_kept_as_its_dtype_when_it_can_be_that(dtype: str, given: Scalar, kept: Scalar) -> None:
    default = Registry([entry(dtype=dtype, default=given)])[0].default
    assert (default, type(default)) == (kept, type(kept))


@pytest.mark.parametrize("count", [0, 63])
def test_registry_is_refused_when_empty_or_too_large(count: int) -> None:
    with pytest.raises(RegistryError, match=f"1 to 62 features, not {count}"):
        Registry([entry(name=f"probe_{number}") for number in range(count)])


def test_mask_names_the_last_feature_when_the_registry_is_full() -> None:
    registry = Registry([entry(name=f"probe_{number}") for number in range(62)])
    mask = registry.mask(["probe_61"])
    assert mask == 1 << 61
    assert registry.full_mask.bit_length() == 62
    assert registry.named("probe_61").name == "probe_61"


def test_fingerprint_differs_when_what_is_computed_differs() -> None:
    for changes in ({"compute": COUNT_VIEWS + " -- all"}, {"dtype": "str"}, {"default": 0}, {"window": timedelta(7)}):
        assert entry(**changes).fingerprint != entry().fingerprint, changes
    sql = f"\n        {COUNT_VIEWS}\n    "
    for changes in ({"name": "other"}, {"ttl": timedelta(1)}, {"description": "Other words."}, {"compute": sql}):
        assert entry(**changes).fingerprint == entry().fingerprint, changes


def test_mask_round_trips_when_features_are_named_in_any_order() -> None:
    names = [REGISTRY[index].name for index in (4, 0, 2, 0)]
    mask = REGISTRY.mask(names)
    assert indices(mask) == [0, 2, 4]
    assert REGISTRY.mask(REGISTRY.names) == REGISTRY.full_mask


def test_mask_names_every_unknown_feature_when_several_are_unknown() -> None:
    with pytest.raises(UnknownFeature) as caught:
        REGISTRY.mask(["preferred_hour", "mood", "tips"])
    details = [issue.detail for issue in caught.value.issues]
    assert [name in detail for name, detail in zip(("'mood'", "'tips'"), details, strict=True)] == [True, True]
    assert all(name in details[0] for name in REGISTRY.names)


def test_named_refuses_when_the_feature_is_unknown() -> None:
    assert REGISTRY.named("preferred_hour").dtype == "int"
    with pytest.raises(UnknownFeature):
        REGISTRY.named("mood")


def test_subjects_partition_the_five_features() -> None:
    assert REGISTRY.invalidated_by(SERVED) == {"tip_volume_30d"}
    assert REGISTRY.invalidated_by(FEEDBACK) == set(REGISTRY.names) - {"tip_volume_30d"}
    assert REGISTRY.invalidated_by("signals.tip.opened") == frozenset()
    assert REGISTRY.longest_window_ms() == 30 * DAY_MS


def test_longest_window_is_that_of_the_features_in_the_mask() -> None:
    registry = Registry([entry(name="week", window=timedelta(days=7)), entry(name="hours", window=timedelta(hours=36))])
    assert registry.longest_window_ms() == 7 * DAY_MS
    assert registry.longest_window_ms(registry.mask(["hours"])) == 36 * 3_600_000


def test_service_has_the_features_of_the_design() -> None:
    stated = {item.name: (item.dtype, item.default, item.ttl) for item in OURS}
    hour = timedelta(hours=1)
    assert {name: stated[name] for name in REGISTRY.names} == {
        "completion_rate_30d": ("float", None, hour),
        "dismiss_rate_30d": ("float", None, hour),
        "mean_dwell_ms_30d": ("float", None, hour),
        "preferred_hour": ("int", None, 6 * hour),
        "tip_volume_30d": ("int", 0, hour),
    }


def test_value_is_converted_when_it_can_be_of_its_dtype() -> None:
    encoded: list[tuple[Dtype, Scalar, bytes]] = [
        ("float", 0.5, b"0.5"),
        ("float", -0.0, b"-0.0"),
        ("float", 1e300, b"1e300"),
        ("float", 3, b"3.0"),
        ("float", 1 << 62, b"4.611686018427388e18"),
        ("int", -(1 << 63), b"-9223372036854775808"),
        ("int", 9.0, b"9"),
        ("int", -0.0, b"0"),
        ("str", 'größer "als"\n', '"größer \\"als\\"\\n"'.encode()),
    ]
    for dtype, value, text in encoded:
        assert msgspec.json.encode(as_dtype(dtype, value)) == text, (dtype, value)


def test_value_is_not_converted_when_it_is_of_another_dtype() -> None:
    foreign: dict[Dtype, list[object]] = {
        "float": [1 << 63, True, "1", float("inf"), float("nan"), None],
        "int": [1.5, 2.0**63, True, "1"],
        "str": [b"x", 1],
    }
    for dtype, values in foreign.items():
        for value in values:
            assert as_dtype(dtype, value) is None, (dtype, value)
