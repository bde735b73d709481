"""The rules of the registry that need no database: one test for each."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from app.errors import RegistryError, UnknownFeature
from app.features.clock import DAY_MS
from app.features.definitions import REGISTRY as OURS
from app.features.events import FEEDBACK, KNOWN_SUBJECTS, SERVED
from app.features.registry import Registry, Scalar, as_dtype, encode_value, indices
from tests.support.entries import COUNT_VIEWS, entry
from tests.support.registry import REGISTRY


def refusal(**changes: object) -> str:
    """The message with which a registry of one entry, changed so, is refused."""
    with pytest.raises(RegistryError) as caught:
        Registry([entry(**changes)])
    assert caught.value.entry == changes.get("name", "probe")
    message = str(caught.value)
    assert repr(caught.value.entry) in message
    return message


def test_registry_is_refused_when_a_name_repeats() -> None:
    with pytest.raises(RegistryError, match=r"'twice'.*repeats"):
        Registry([entry(name="twice"), entry(name="once"), entry(name="twice")])


@pytest.mark.parametrize("name", ["", "7up", "with space", "with-dash", "a.b", "größe", "class", "a,b", "a/b"])
def test_registry_is_refused_when_a_name_is_no_identifier(name: str) -> None:
    assert "identifier" in refusal(name=name)


def test_registry_is_refused_when_a_dtype_is_unknown() -> None:
    message = refusal(dtype="decimal")
    assert "'decimal'" in message
    assert "float, int, str" in message


@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(seconds=-1), timedelta(microseconds=999)])
def test_registry_is_refused_when_a_ttl_is_not_positive(ttl: timedelta) -> None:
    assert "TTL must be positive" in refusal(ttl=ttl)


def test_registry_is_refused_when_a_window_is_not_positive() -> None:
    assert "window must be positive" in refusal(window=timedelta(0))


@pytest.mark.parametrize("description", ["", " \n\t"])
def test_registry_is_refused_when_a_description_is_empty(description: str) -> None:
    assert "description is empty" in refusal(description=description)


def test_registry_is_refused_when_a_subject_is_unknown() -> None:
    message = refusal(invalidated_by=(SERVED, "signals.tip.opened"))
    assert "'signals.tip.opened'" in message
    assert all(subject in message for subject in KNOWN_SUBJECTS)


@pytest.mark.parametrize("subjects", ["signals.tip.served", [SERVED]])
def test_registry_is_refused_when_the_subjects_are_no_tuple(subjects: object) -> None:
    assert "invalidated_by must be a tuple of subjects" in refusal(invalidated_by=subjects)


@pytest.mark.parametrize("changes", [{"ttl": 3600}, {"window": 30}, {"compute": None}, {"description": 7}, {"name": 7}])
def test_registry_is_refused_when_a_field_is_of_another_type(changes: dict[str, object]) -> None:
    with pytest.raises(RegistryError, match=f"feature '{changes.get('name', 'probe')}': "):
        Registry([entry(**changes)])


@pytest.mark.parametrize("item", ["probe", None, {"name": "probe"}])
def test_registry_is_refused_when_an_entry_is_no_feature(item: Any) -> None:
    with pytest.raises(RegistryError, match="an entry must be a Feature"):
        Registry([item])


@pytest.mark.parametrize(
    ("dtype", "default"),
    [
        ("float", float("nan")),
        ("float", float("inf")),
        ("float", "0"),
        ("float", False),
        ("int", 0.5),
        ("int", True),
        ("int", "0"),
        ("str", 0),
        ("str", b"none"),
        ("int", object()),
        ("int", 1 << 63),
        ("int", -(1 << 63) - 1),
    ],
)
def test_registry_is_refused_when_a_default_is_not_of_its_dtype(dtype: str, default: object) -> None:
    assert f"is not of dtype {dtype}" in refusal(dtype=dtype, default=default)


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


@pytest.mark.parametrize(
    "changes", [{"compute": COUNT_VIEWS + " -- all"}, {"dtype": "str"}, {"default": 0}, {"window": timedelta(days=7)}]
)
def test_fingerprint_differs_when_what_is_computed_differs(changes: dict[str, object]) -> None:
    assert entry(**changes).fingerprint != entry().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"ttl": timedelta(days=1)},
        {"description": "Other words."},
        {"compute": f"\n        {COUNT_VIEWS}\n    "},
    ],
)
def test_fingerprint_ignores_the_description(changes: dict[str, object]) -> None:
    assert entry(**changes).fingerprint == entry().fingerprint


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


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        ("float", 0.5, b"0.5"),
        ("float", -0.0, b"-0.0"),
        ("float", 1e300, b"1e300"),
        ("float", 3, b"3.0"),
        ("float", 1 << 62, b"4.611686018427388e18"),
        ("int", -(1 << 63), b"-9223372036854775808"),
        ("int", 9.0, b"9"),
        ("int", -0.0, b"0"),
        ("str", 'größer "als"\n', '"größer \\"als\\"\\n"'.encode()),
    ],
)
def test_value_is_encoded_when_it_can_be_of_its_dtype(dtype: str, value: Scalar, text: bytes) -> None:
    registry = Registry([entry(dtype=dtype)])
    assert encode_value(registry[0].dtype, value) == text


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float", 1 << 63),
        ("float", True),
        ("float", "1"),
        ("float", float("inf")),
        ("float", float("nan")),
        ("float", None),
        ("int", 1.5),
        ("int", 2.0**63),
        ("int", True),
        ("int", "1"),
        ("str", b"x"),
        ("str", 1),
    ],
)
def test_value_is_not_encoded_when_it_is_of_another_dtype(dtype: str, value: object) -> None:
    registry = Registry([entry(dtype=dtype)])
    assert as_dtype(registry[0].dtype, value) is None
    assert encode_value(registry[0].dtype, value) is None
