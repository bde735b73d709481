"""The typed mirror and the registry, held against each other in both directions."""

from typing import Annotated

import msgspec
import pytest
from msgspec import UNSET, Meta, UnsetType

from app.errors import RegistryError
from app.features.registry import Registry
from app.features.schema import Int, Str, check_mirror
from tests.support.entries import entry
from tests.support.features import ProfileFeatures
from tests.support.registry import REGISTRY

PROBE = Registry([entry(description="What it is.")])


def mirror(name: str, declared: object) -> type[msgspec.Struct]:
    return msgspec.defstruct("Mirror", [(name, declared, UNSET)], kw_only=True)


def test_mirror_and_registry_agree() -> None:
    check_mirror(REGISTRY, ProfileFeatures)
    assert ProfileFeatures.__struct_fields__ == REGISTRY.names


def test_mirror_is_accepted_when_it_repeats_the_entry() -> None:
    check_mirror(PROBE, mirror("probe", Annotated[Int | UnsetType, Meta(description="What it is.")]))


def test_mirror_is_refused_when_a_feature_is_missing() -> None:
    extra = Registry([*REGISTRY, entry(name="extra")])
    with pytest.raises(RegistryError, match=r"'extra': it is in the registry"):
        check_mirror(extra, ProfileFeatures)
    fewer = Registry(item for item in REGISTRY if item.name != "preferred_hour")
    with pytest.raises(RegistryError, match=r"'preferred_hour': it is in the mirror"):
        check_mirror(fewer, ProfileFeatures)


def test_mirror_is_refused_when_a_dtype_differs() -> None:
    for declared in (Str | UnsetType, float | None | UnsetType, bool | None | UnsetType, int | str | None | UnsetType):
        with pytest.raises(RegistryError, match=r"'probe': its dtype is int in the registry"):
            check_mirror(PROBE, mirror("probe", Annotated[declared, Meta(description="What it is.")]))


def test_mirror_is_refused_when_a_description_differs() -> None:
    described = [Annotated[Int | UnsetType, Meta(description=text)] for text in ("What it was.", "What it is", "")]
    for declared in (*described, Int | UnsetType):
        with pytest.raises(RegistryError, match=r"'probe': its description"):
            check_mirror(PROBE, mirror("probe", declared))


def test_mirror_may_rename_fields() -> None:
    declared = Annotated[Int | UnsetType, Meta(description="What it is.")]
    renamed = msgspec.defstruct("Mirror", [("PROBE", declared, UNSET)], kw_only=True, rename="lower")
    check_mirror(PROBE, renamed)


def test_absent_and_null_features_differ_when_a_profile_is_decoded() -> None:
    decoded = msgspec.json.decode(b'{"preferred_hour": null, "tip_volume_30d": 3}', type=ProfileFeatures)
    assert decoded.preferred_hour is None
    assert decoded.tip_volume_30d == 3
    assert decoded.completion_rate_30d is UNSET
    assert msgspec.json.decode(msgspec.json.encode(decoded)) == {"preferred_hour": None, "tip_volume_30d": 3}
