"""The rules of the registry that need no database: one test for each."""

from __future__ import annotations

from datetime import timedelta

import pytest

from app.errors import RegistryError, UnknownFeature
from app.features.events import FEEDBACK, KNOWN_SUBJECTS, SERVED
from app.features.registry import Registry, Scalar, conforms, encode_value, indices
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


def test_registry_is_refused_when_nothing_invalidates_a_feature() -> None:
    assert "names no subject" in refusal(invalidated_by=())


@pytest.mark.parametrize(
    ("dtype", "default"),
    [
        ("float", 0),
        ("float", float("nan")),
        ("float", float("inf")),
        ("float", "0"),
        ("int", 0.0),
        ("int", True),
        ("int", "0"),
        ("str", 0),
        ("str", b"none"),
        ("int", object()),
    ],
)
def test_registry_is_refused_when_a_default_is_not_of_its_dtype(dtype: str, default: object) -> None:
    assert f"is not of dtype {dtype}" in refusal(dtype=dtype, default=default)


@pytest.mark.parametrize("default", [1 << 63, -(1 << 63) - 1])
def test_registry_is_refused_when_a_default_is_beyond_64_bits(default: int) -> None:
    assert "64 bits" in refusal(default=default)


@pytest.mark.parametrize("count", [0, 63])
def test_registry_is_refused_when_it_holds_no_feature_or_more_than_a_mask_can_name(count: int) -> None:
    with pytest.raises(RegistryError, match=f"1 to 62 features, not {count}"):
        Registry([entry(name=f"probe_{number}") for number in range(count)])


def test_mask_names_the_last_feature_when_the_registry_is_full() -> None:
    registry = Registry([entry(name=f"probe_{number}") for number in range(62)])
    mask = registry.mask(["probe_61"])
    assert mask == 1 << 61
    assert registry.full_mask.bit_length() == 62
    assert registry.named("probe_61").name == "probe_61"


@pytest.mark.parametrize("changes", [{"compute": COUNT_VIEWS + " "}, {"dtype": "str"}, {"default": 0}])
def test_fingerprint_differs_when_what_is_computed_differs(changes: dict[str, object]) -> None:
    assert entry(**changes).fingerprint != entry().fingerprint


@pytest.mark.parametrize("changes", [{"name": "other"}, {"ttl": timedelta(days=1)}, {"description": "Other words."}])
def test_fingerprint_is_the_same_when_only_the_description_of_a_value_differs(changes: dict[str, object]) -> None:
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
    assert REGISTRY.longest_window == timedelta(days=30)


def test_registry_states_the_contract_of_the_design() -> None:
    stated = [(item.name, item.dtype, item.default, item.ttl) for item in REGISTRY]
    hour = timedelta(hours=1)
    assert stated == [
        ("completion_rate_30d", "float", None, hour),
        ("dismiss_rate_30d", "float", None, hour),
        ("mean_dwell_ms_30d", "float", None, hour),
        ("preferred_hour", "int", None, 6 * hour),
        ("tip_volume_30d", "int", 0, hour),
    ]


@pytest.mark.parametrize(
    ("dtype", "value", "text"),
    [
        ("float", 0.5, b"0.5"),
        ("float", -0.0, b"-0.0"),
        ("float", 1e300, b"1e300"),
        ("int", -(1 << 63), b"-9223372036854775808"),
        ("str", 'größer "als"\n', '"größer \\"als\\"\\n"'.encode()),
    ],
)
def test_value_is_encoded_when_it_is_of_its_dtype(dtype: str, value: Scalar, text: bytes) -> None:
    registry = Registry([entry(dtype=dtype)])
    assert encode_value(registry[0].dtype, value) == text


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("float", 1),
        ("float", float("inf")),
        ("float", float("nan")),
        ("float", None),
        ("int", 1.0),
        ("int", True),
        ("int", "1"),
        ("str", b"x"),
        ("str", 1),
    ],
)
def test_value_is_not_encoded_when_it_is_of_another_dtype(dtype: str, value: object) -> None:
    registry = Registry([entry(dtype=dtype)])
    assert not conforms(registry[0].dtype, value)
    assert encode_value(registry[0].dtype, value) is None
