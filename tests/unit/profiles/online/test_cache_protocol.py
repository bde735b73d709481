"""What stands in a key, as bytes; whatever this service did not write is no value."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.profiles.online.cache_protocol import LEASE, FeatureValue, decode, encode, hits, present


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


FINGERPRINTS = [b"0123abcd", b"89ef4567", b"00000000"]
numbers = st.integers(0, 10**13 - 1)
value_of = st.builds(
    FeatureValue,
    fingerprint=st.sampled_from(FINGERPRINTS),
    version=st.integers(0, (1 << 63) - 1),
    computed_at_ms=numbers,
    expires_at_ms=numbers,
    json=st.one_of(st.floats(), st.integers(), st.none(), st.text()).map(lambda value: json.dumps(value).encode()),
    cached=st.just(True),
    error=st.none(),
)


@given(st.lists(value_of, min_size=1, max_size=6))
def test_hits_are_the_json_of_matching_values(values: list[FeatureValue]) -> None:
    newest = max(value.computed_at_ms for value in values)
    oldest = min(value.expires_at_ms or 0 for value in values)
    match, held = hits([value.fingerprint for value in values]), [encode(value) for value in values]
    for now_ms in {max(0, newest - 1_001), max(0, newest - 1_000), newest, max(0, oldest - 1), oldest}:
        found = match(held, present(now_ms))
        if newest <= now_ms + 1_000 and now_ms < oldest:
            assert found is not None
            assert list(found) == [value.json for value in values]
        else:
            assert found is None


strangers = st.one_of(
    st.binary(),
    st.binary().map(lambda nonce: LEASE + nonce),
    st.binary().map(lambda rest: b"V" + rest),
    st.binary().map(lambda rest: b"V" + FINGERPRINTS[0] + b":" + rest),
    value_of.map(encode),
    st.tuples(value_of, value_of).map(lambda two: encode(two[0]) + b"\0" + encode(two[1])),
    value_of.map(lambda value: encode(value._replace(json=b""))),
)


@given(st.lists(st.tuples(st.sampled_from(FINGERPRINTS), strangers), min_size=1, max_size=4), numbers)
def test_hits_agree_with_decoding_for_any_bytes(held: list[tuple[bytes, bytes]], now_ms: int) -> None:
    found = hits([fingerprint for fingerprint, _ in held])([raw for _, raw in held], present(now_ms))
    if found is None:
        return
    for (fingerprint, raw), json_text in zip(held, found, strict=True):
        value = decode(raw)
        assert value is not None
        assert (value.fingerprint, value.json) == (fingerprint, json_text)
        assert value.computed_at_ms <= now_ms + 1_000
        assert now_ms < (value.expires_at_ms or 0)
