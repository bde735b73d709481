"""Which dead letters name a user."""

import base64
import json
import pickle
import time
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from app.events.erasure import names

USER = "user-7"


def test_user_is_named() -> None:
    for payload in (
        {"user_id": USER},
        {"userId": USER, "tip_id": "t"},
        {"USER-ID": USER},
        {"deep": [{"er": {"uid": USER}}]},
        {"user": [USER]},
        {"id": USER},
        {USER: 1},
        [1, USER],
        USER,
        f"user_id={USER};",
        f"user_id,tip_id\n{USER},t",
        f"of {USER}.",
        json.dumps({"user_id": USER}),
        base64.b64encode(f'{{"user_id": "{USER}"'.encode()).decode(),
        USER.encode(),
    ):
        assert names(payload, USER), payload


def test_user_is_not_named() -> None:
    others: tuple[object, ...] = (
        {"user_id": "another", "tip_id": USER},
        {"userId": "another", "deep": [USER]},
        {"user_id": USER + "1"},
        f"of {USER}1, x{USER}, {USER}-b and a-{USER}",
        base64.b64encode(f"{USER}1".encode()).decode(),
        *("", 7, None, []),
    )
    for payload in others:
        assert not names(payload, USER), payload


def test_number_is_an_id_in_an_id_field() -> None:
    assert names({"userId": 42}, "42")
    assert not names({"dwell_ms": 42}, "42")


ids = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/\\"), min_size=1, max_size=128)


@given(user=ids, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL), other=ids)
def test_user_is_named_in_bytes_of_every_kind(user: str, protocol: int, other: str) -> None:
    job: dict[str, Any] = {"f": "tip_events", "a": [[{"tip_id": other, "user_id": user}]]}
    packed = msgspec.msgpack.encode(job)
    assert names(packed[1:], user)
    assert names(pickle.dumps(job, protocol), user)


def test_depth_is_no_limit() -> None:
    payload: Any = {"user_id": USER}
    for _ in range(100_000):
        payload = [payload]
    assert names(payload, USER)


def test_large_text_that_repeats_the_id_is_searched_fast() -> None:
    started = time.monotonic()
    assert not names("anna" * 250_000, "ann")
    assert time.monotonic() - started < 5
