r"""Requests that two programs on the way may read differently, as bytes: one request, one answer, or none at all.

Behind each stands a request that must not be smuggled in: where the server goes on with the connection it answers that
one too, so an answer too many, or a 200 for `/healthz` where it is part of a body, shows.
"""

from __future__ import annotations

import pytest

from tests.support.live import KEYS, Live
from tests.support.raw_http import MARK, exchange

HOST = b"Host: localhost\r\n"
KEY = b"X-API-Key: " + KEYS["reader"].encode() + b"\r\n"
BODY = b'{"user_ids":["u"]}'
CHUNKED = b"12\r\n" + BODY + b"\r\n0\r\n\r\n"
POST = b"POST /profiles/batch HTTP/1.1\r\n" + HOST + KEY + b"Content-Type: application/json\r\n"
GET = b"GET /features HTTP/1.1\r\n"
CLOSE = b"Connection: close\r\n"

REFUSED = {
    "two lengths": POST + b"Content-Length: 18\r\nContent-Length: 19\r\n\r\n" + BODY,
    "a list of lengths": POST + b"Content-Length: 18, 18\r\n\r\n" + BODY,
    "a length with a sign": POST + b"Content-Length: +18\r\n\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "a length in hexadecimal": POST + b"Content-Length: 0x12\r\n\r\n" + BODY,
    "a length beyond 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    "a coding that is nearly chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "a coding after chunked": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
    "two codings": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED,
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "a negative chunk": POST + b"Transfer-Encoding: chunked\r\n\r\n-" + CHUNKED,
    "a chunk in C's hexadecimal": POST + b"Transfer-Encoding: chunked\r\n\r\n0x" + CHUNKED,
    "a chunk that wraps round": POST + b"Transfer-Encoding: chunked\r\n\r\n100000000000000" + CHUNKED,
    "a chunk longer than it says": POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED.replace(b"12\r", b"10\r"),
    "a chunk's size ended by LF": POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED.replace(b"12\r", b"12"),
    "LF in a chunk's extension": POST + b"Transfer-Encoding: chunked\r\n\r\n12;a\nb" + CHUNKED[2:],
    "a folded header": GET + HOST + b"X-API-Key: read-me-\r\n if-you-can\r\n\r\n",
    "a header before the first": GET + b" X: a\r\n" + HOST + KEY + b"\r\n",
    "a bare CR in a header": GET + HOST + b"X-A: a\r" + KEY + b"\r\n",
    "a space before the colon": GET + HOST + b"X-API-Key : read-me-if-you-can\r\n\r\n",
    "a space before the colon of a length": POST + b"Content-Length : 18\r\n\r\n" + BODY,
    "a space before the colon of chunks": POST + b"Transfer-Encoding : chunked\r\n\r\n" + CHUNKED,
    "NUL in a value": GET + HOST + KEY[:-2] + b"\0\r\n\r\n",
    "NUL in a name": GET + HOST + b"X\0: a\r\n" + KEY + b"\r\n",
    "a space in the target": b"GET /profiles/a b HTTP/1.1\r\n" + HOST + KEY + b"\r\n",
    "a control character in the method": b"G\x01T /features HTTP/1.1\r\n" + HOST + KEY + b"\r\n",
    "tabs for spaces": b"GET\t/features\tHTTP/1.1\r\n" + HOST + KEY + b"\r\n",
    "HTTP/0.9": b"GET /features\r\n\r\n",
    "HTTP/3.0": b"GET /features HTTP/3.0\r\n" + HOST + KEY + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40,
}  # fmt: skip


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED)
async def test_request_is_refused_and_the_connection_closed_when_it_could_be_read_in_two_ways(
    keyed: Live, sent: bytes
) -> None:
    answer = await exchange(keyed.port, sent + MARK)
    assert answer.statuses == [400]
    assert b"alive" not in answer.raw


async def test_nothing_is_answered_when_the_client_begins_with_http_2(keyed: Live) -> None:
    assert (await exchange(keyed.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + MARK)).raw == b""


SEVERAL = {
    "two hosts": GET + HOST + b"Host: elsewhere.example\r\n" + KEY,
    "a host twice": GET + HOST + HOST + KEY,
    "two keys": GET + HOST + KEY + b"X-API-Key: wrong\r\n",
    "a key twice": GET + HOST + KEY + KEY,
    "two keys of a read that is a hit": b"GET /profiles/u HTTP/1.1\r\n" + HOST + KEY + b"x-api-key: wrong\r\n",
    "two hosts of a read that is a hit": b"GET /profiles/u HTTP/1.1\r\n" + HOST + b"host: b.example\r\n" + KEY,
    "two types": POST + b"Content-Type: text/plain\r\nContent-Length: 0\r\n",
}


@pytest.mark.parametrize("sent", SEVERAL.values(), ids=SEVERAL)
async def test_request_is_refused_when_a_header_that_decides_comes_twice(keyed: Live, sent: bytes) -> None:
    answer = await exchange(keyed.port, sent + CLOSE + b"\r\n")
    assert answer.statuses == [400]
    assert b"application/problem+json" in answer.raw
    assert b"x-request-id: " in answer.raw


@pytest.mark.parametrize("order", [b"%b%b", b"%2$b"], ids=["length first", "chunks first"])
async def test_chunks_count_and_the_connection_closes_when_a_length_stands_there_too(keyed: Live, order: bytes) -> None:
    length, chunks = b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"
    both = length + chunks if order == b"%b%b" else chunks + length
    answer = await exchange(keyed.port, POST + both + b"\r\n" + CHUNKED + MARK)
    assert answer.statuses == [200]
    assert b'"profiles"' in answer.raw
    assert b"alive" not in answer.raw


async def test_length_counts_when_it_is_given_twice_alike(keyed: Live) -> None:
    sent = POST + b"Content-Length: 18\r\nContent-Length: 18\r\n\r\n" + BODY + MARK
    assert (await exchange(keyed.port, sent)).statuses == [200, 200]


async def test_body_of_a_get_is_no_request(keyed: Live) -> None:
    hidden = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    for path in (b"/profiles/u", b"/features", b"/nothing"):
        head = b"GET " + path + b" HTTP/1.1\r\n" + HOST + KEY + b"Content-Length: %d\r\n\r\n" % len(hidden)
        answer = await exchange(keyed.port, head + hidden + MARK)
        assert len(answer.statuses) == 2
        assert b"profiles_http_request" not in answer.raw


async def test_unread_body_is_no_request_when_its_request_is_refused(keyed: Live) -> None:
    hidden = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    for head in (b"POST /events HTTP/1.1\r\n" + HOST, b"POST /nothing HTTP/1.1\r\n" + HOST, GET + HOST + HOST):
        answer = await exchange(keyed.port, head + b"Content-Length: %d\r\n\r\n" % len(hidden) + hidden + MARK)
        assert answer.statuses in ([401, 200], [404, 200], [400, 200])
        assert b"profiles_http_request" not in answer.raw


async def test_key_is_not_taken_from_a_trailer(keyed: Live) -> None:
    head = POST.replace(KEY, b"") + b"Transfer-Encoding: chunked\r\nTrailer: X-API-Key\r\n"
    chunks = CHUNKED[:-2] + KEY + b"\r\n"
    assert (await exchange(keyed.port, head + CLOSE + b"\r\n" + chunks)).statuses == [401]


async def test_answers_come_in_order_when_requests_are_pipelined(keyed: Live) -> None:
    paths = [b"/profiles/a", b"/nothing", b"/profiles/b?detail=true", b"/profiles/a%2fb", b"/features"]
    sent = b"".join(b"GET " + path + b" HTTP/1.1\r\n" + HOST + KEY + b"\r\n" for path in paths)
    assert (await exchange(keyed.port, sent + MARK)).statuses == [200, 404, 200, 422, 200, 200]


@pytest.mark.parametrize(
    "wish",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    ],
    ids=["h2c", "websocket"],
)
async def test_protocol_stays_when_another_is_wished_for(keyed: Live, wish: bytes) -> None:
    answer = await exchange(keyed.port, GET + HOST + KEY + wish + b"\r\n" + MARK)
    assert answer.statuses == [200, 200]
    answer = await exchange(keyed.port, GET + HOST + wish + b"\r\n" + MARK)
    assert answer.statuses == [401, 200]


async def test_coding_beneath_the_chunks_is_refused(keyed: Live) -> None:
    answer = await exchange(keyed.port, POST + b"Transfer-Encoding: gzip, chunked\r\n" + CLOSE + b"\r\n" + CHUNKED)
    assert answer.statuses == [415]


HEADER_FLOODS = {
    "many headers": b"".join(b"X-%d: a\r\n" % number for number in range(2_000)),
    "a header of a megabyte": b"X-A: " + b"a" * 1_000_000 + b"\r\n",
}


@pytest.mark.parametrize("flood", HEADER_FLOODS.values(), ids=HEADER_FLOODS)
async def test_headers_are_refused_when_they_are_too_many_or_too_long(keyed: Live, flood: bytes) -> None:
    answer = await exchange(keyed.port, GET + HOST + KEY + flood + b"\r\n" + MARK)
    assert answer.statuses in ([431], [400])


async def test_target_is_refused_when_it_is_too_long(keyed: Live) -> None:
    answer = await exchange(keyed.port, b"GET /profiles/" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + KEY + b"\r\n")
    assert answer.statuses == [414]


@pytest.mark.parametrize("target", [b"*", b"features", b"localhost:80", b"//features", b"/../features", b"/./features"])
async def test_target_is_not_found_when_it_is_no_path_of_ours(keyed: Live, target: bytes) -> None:
    for method in (b"GET", b"OPTIONS", b"CONNECT"):
        answer = await exchange(keyed.port, method + b" " + target + b" HTTP/1.1\r\n" + HOST + KEY + CLOSE + b"\r\n")
        assert answer.statuses in ([404], [400], [405]), (method, target)


async def test_header_is_not_split_by_what_a_path_holds(keyed: Live) -> None:
    for path in (
        b"/features%0d%0aX-Evil:1",
        b"/admin/users/a%0d%0aX-Evil:1",
        b"/admin/sign-in?next=/admin%0d%0aX-Evil:1",
    ):
        answer = await exchange(keyed.port, b"GET " + path + b" HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n")
        assert len(answer.statuses) == 1
        assert b"\r\nx-evil" not in answer.raw.lower()
