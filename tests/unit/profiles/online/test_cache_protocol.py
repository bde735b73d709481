"""What stands in a key, as bytes; whatever this service did not write is no value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.features.registry import Registry, indices
from app.profiles.online.cache_protocol import (
    LAST_EXPIRY_MS,
    LEASE,
    FeatureMask,
    FeatureValue,
    ReadTime,
    decode,
    encode,
)
from tests.support.entries import entry


@given(
    st.builds(
        FeatureValue,
        fingerprint=st.text("0123456789abcdef", min_size=8, max_size=8).map(str.encode),
        version=st.integers(0, 1 << 62),
        computed_at_ms=st.integers(-(1 << 50), 1 << 50),
        expires_at_ms=st.integers(-(1 << 50), 1 << 50),
        json=st.binary(min_size=1),
        cached=st.just(True),
        error=st.none(),
        unproven=st.just(False),
    )
)
def test_decode_gives_back_the_value_when_it_was_encoded(value: FeatureValue) -> None:
    assert decode(encode(value)) == value


def test_encoded_bytes_are_those_of_the_design() -> None:
    assert encode(FeatureValue(b"0123abcd", 7, 1, 2, b'"a:b"')) == b'V0123abcd:7:0000000000001:0000000000002:"a:b"'


@pytest.mark.parametrize(
    "held",
    [None, b"", b"L", b"Lnonce", b"V", b"V:", b"Vabc", b"Vf:1:2:3:", b"Vf:1:2:3", b"Vf:x:2:3:4", b"Vf:1:2::4", b"xyz"],
)
def test_decode_gives_nothing_when_the_bytes_are_no_value(held: bytes | None) -> None:
    assert decode(held) is None


@given(st.binary())
def test_decode_never_raises_when_the_bytes_are_garbage(held: bytes) -> None:
    decode(b"V" + held)
    decode(held)


# The first two have the same fingerprint.
SAME = entry(name="one"), entry(name="two")
REGISTRY = Registry([*SAME, entry(name="three", default=3)])
FINGERPRINTS = [feature.fingerprint.encode() for feature in REGISTRY]
numbers = st.integers(0, LAST_EXPIRY_MS)


def values_of(fingerprint: bytes) -> st.SearchStrategy[FeatureValue]:
    return st.builds(
        FeatureValue,
        fingerprint=st.just(fingerprint),
        version=st.integers(0, (1 << 63) - 1),
        computed_at_ms=numbers,
        expires_at_ms=numbers,
        json=st.one_of(st.floats(), st.integers(), st.none(), st.text()).map(lambda value: json.dumps(value).encode()),
        cached=st.just(True),
        error=st.none(),
    )


masks = st.integers(1, REGISTRY.full_mask)


@st.composite
def rows_of_values(draw: st.DrawFn) -> tuple[int, list[list[FeatureValue]]]:
    """A mask, and the values of its features for some users."""
    mask = draw(masks)
    row = st.tuples(*(values_of(FINGERPRINTS[index]) for index in indices(mask))).map(list)
    return mask, draw(st.lists(row, min_size=1, max_size=4))


@given(rows_of_values())
def test_hits_are_the_json_of_values_between_their_times(drawn: tuple[int, list[list[FeatureValue]]]) -> None:
    mask, rows = drawn
    feature_mask, values = FeatureMask(REGISTRY, mask), [value for row in rows for value in row]
    newest = max(value.computed_at_ms for value in values)
    oldest = min(value.expires_at_ms or 0 for value in values)
    for now_ms in {max(0, newest - 1_001), max(0, newest - 1_000), newest, max(0, oldest - 1), oldest}:
        found = feature_mask.rows([encode(value) for value in values], ReadTime.of(now_ms))
        if newest <= now_ms + 1_000 and now_ms < oldest:
            assert found is not None
            assert [list(row) for row in found] == [[value.json for value in row] for row in rows]
        else:
            assert found is None
        for row in rows:
            alone = feature_mask.values([encode(value) for value in row], ReadTime.of(now_ms))
            assert alone is not None or found is None


value_of = st.sampled_from(FINGERPRINTS).flatmap(values_of)
contents = st.one_of(
    st.none(),
    st.binary(),
    st.binary().map(lambda nonce: LEASE + nonce),
    st.binary().map(lambda rest: b"V" + rest),
    st.binary().map(lambda rest: b"V" + FINGERPRINTS[0] + b":" + rest),
    value_of.map(encode),
    st.tuples(st.binary(), value_of).map(lambda two: two[0] + encode(two[1])),
    st.tuples(value_of, value_of).map(lambda two: encode(two[0]) + b"\0" + encode(two[1])),
    value_of.map(lambda value: encode(value._replace(json=b""))),
)


@given(masks, st.lists(contents, min_size=6, max_size=6), numbers)
def test_hits_agree_with_decoding_for_any_bytes(mask: int, held: list[bytes | None], now_ms: int) -> None:
    feature_mask, at = FeatureMask(REGISTRY, mask), ReadTime.of(now_ms)
    count = len(held) // feature_mask.width * feature_mask.width
    parts = [held[start : start + feature_mask.width] for start in range(0, count, feature_mask.width)]
    alone = [feature_mask.values(part, at) for part in parts]
    together = feature_mask.rows(held[:count], at)
    assert together == (None if None in alone else alone)
    for part, found in zip(parts, alone, strict=True):
        values = [decode(raw) for raw in part]
        expected = [
            value.json
            for index, value in zip(feature_mask.indices, values, strict=True)
            if value is not None
            and value.fingerprint == FINGERPRINTS[index]
            and value.computed_at_ms <= now_ms + 1_000
            and now_ms < (value.expires_at_ms or 0)
        ]
        assert found is None or list(found) == expected
