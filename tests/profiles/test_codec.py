"""What stands in a key, as bytes; whatever this service did not write is no value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.profiles.codec import Value, decode, encode


@given(
    st.builds(
        Value,
        fingerprint=st.text("0123456789abcdef", min_size=8, max_size=8).map(str.encode),
        seq=st.integers(0, 1 << 62),
        computed_at_ms=st.integers(-(1 << 50), 1 << 50),
        expires_at_ms=st.integers(-(1 << 50), 1 << 50),
        json=st.binary(min_size=1),
    )
)
def test_decode_gives_back_the_value_when_it_was_encoded(value: Value) -> None:
    assert decode(encode(value)) == value


def test_bytes_are_what_the_design_says_when_a_value_is_encoded() -> None:
    assert encode(Value(b"0123abcd", 7, 1, 2, b'"a:b"')) == b'V0123abcd:7:1:2:"a:b"'


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
