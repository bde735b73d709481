"""Requests as bytes, and responses from bytes, in whatever pieces they arrive."""

from __future__ import annotations

from math import nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles_client import ConnectionLost, Profiles
from profiles_client.wire import Endpoint, Request, Response, ResponseReader

WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Request-Id: a\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\nRetry-After: 1\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
ANSWERS = {
    WITH_LENGTH: Response(200, {b"content-length": b"5", b"x-request-id": b"a"}, b"hello"),
    CHUNKED: Response(503, {b"transfer-encoding": b"chunked", b"retry-after": b"1"}, b"hello"),
    EMPTY: Response(204, {}, b""),
    EARLY + WITH_LENGTH: Response(200, {b"content-length": b"5", b"x-request-id": b"a"}, b"hello"),
}
TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


def head(url: str, request: Request, key: str | None = None) -> str:
    return Endpoint(url, key, None).encoded(request).decode()


def test_get_is_plain_http() -> None:
    assert head("http://h:8000", Request("GET", "/x", None, TRACE), "secret") == (
        "GET /x HTTP/1.1\r\nHost: h:8000\r\nUser-Agent: profiles-client\r\n"
        f"X-API-Key: secret\r\ntraceparent: {TRACE}\r\n\r\n"
    )


def test_post_has_type_and_length() -> None:
    assert head("http://h", Request("POST", "/x", "é".encode())) == (
        "POST /x HTTP/1.1\r\nHost: h\r\nUser-Agent: profiles-client\r\n"
        "Content-Type: application/json\r\nContent-Length: 2\r\n\r\né"
    )


@pytest.mark.parametrize(
    ("url", "host", "port", "first"),
    [
        ("http://h", "h", 80, "GET /x "),
        ("http://h:81/", "h", 81, "GET /x "),
        ("http://[::1]:81/a/b/", "::1", 81, "GET /a/b/x "),
    ],
)
def test_url_may_have_port_and_path(url: str, host: str, port: int, first: str) -> None:
    endpoint = Endpoint(url, None, None)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert endpoint.encoded(Request("GET", "/x")).decode().startswith(first)


@pytest.mark.parametrize(
    "url",
    [
        "h:8000",
        "ftp://h",
        "http://",
        "http://u:p@h",
        "http://h?a=b",
        "http://h#a",
        "http://h/a b",
        "http://h:x",
        "http://é",
        "http://a..b",
        f"http://{'a' * 64}.org",
        "http://h:0",
    ],
)
def test_url_is_rejected_when_it_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"url|port|Port"):
        Profiles(url)


@pytest.mark.parametrize("key", ["", "a\r\nX: y", "ä", " a"])
def test_key_is_rejected_when_no_header_can_hold_it(key: str) -> None:
    with pytest.raises(ValueError, match=r"^key: ") as caught:
        Profiles("http://h", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("deadline_s", [0, -1, nan])
def test_deadline_must_be_positive(deadline_s: float) -> None:
    with pytest.raises(ValueError, match=r"^deadline_s: "):
        Profiles("http://h", deadline_s=deadline_s)


@pytest.mark.parametrize("value", ["", "x", TRACE + "\r\nX-API-Key: stolen", TRACE.upper(), TRACE[:-1]])
def test_traceparent_is_left_out_when_it_is_malformed(value: str) -> None:
    assert "traceparent" not in head("http://h", Request("GET", "/x", None, value))


@given(st.lists(st.sampled_from(list(ANSWERS)), min_size=1, max_size=4), st.data())
def test_responses_do_not_depend_on_how_they_are_cut(sent: list[bytes], data: st.DataObject) -> None:
    reader, found = ResponseReader(), []
    for answer in sent:
        cuts = data.draw(st.lists(st.integers(1, len(answer) - 1), max_size=4, unique=True).map(sorted))
        pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
        found += [response for piece in pieces if (response := reader.feed(piece)) is not None]
    assert found == [ANSWERS[answer] for answer in sent]
    assert reader.reusable


@pytest.mark.parametrize(
    "answer",
    [
        WITH_LENGTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        WITH_LENGTH.replace(b"1.1", b"1.0"),
        WITH_LENGTH + EMPTY,  # one more than was asked for
    ],
)
def test_connection_is_not_used_again_when_its_answer_was_the_last(answer: bytes) -> None:
    reader = ResponseReader()
    response = reader.feed(answer)
    assert response is not None
    assert response.body == b"hello"
    assert not reader.reusable


def test_answer_without_a_length_ends_with_the_connection() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.0 404 Not Found\r\nServer: x\r\n\r\n<html>") is None
    assert reader.feed(b"</html>") is None
    assert reader.feed(b"") == Response(404, {b"server": b"x"}, b"<html></html>")
    assert not reader.reusable


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n", WITH_LENGTH[:-1], CHUNKED[:-1], EARLY])
def test_connection_is_lost_when_it_ends_within_an_answer(start: bytes) -> None:
    reader = ResponseReader()
    assert reader.feed(start) is None
    with pytest.raises(ConnectionLost):
        reader.feed(b"")


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"])
def test_connection_is_lost_when_the_answer_is_not_http(data: bytes) -> None:
    with pytest.raises(ConnectionLost):
        ResponseReader().feed(data)
