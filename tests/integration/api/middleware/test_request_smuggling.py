"""Requests that two programs may read differently, as bytes: each gets one answer, or none.

A second request follows each. If the server took a body for a request, or this request for a body, the number of
answers would differ.
"""

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


async def test_connection_is_closed_when_a_request_is_ambiguous(keyed: Live) -> None:
    for name, sent in REFUSED.items():
        answer = await exchange(keyed.port, sent + MARK)
        assert answer.statuses == [400], name
        assert b"alive" not in answer.raw, name


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


async def test_request_is_refused_when_a_decisive_header_is_repeated(keyed: Live) -> None:
    for name, sent in SEVERAL.items():
        answer = await exchange(keyed.port, sent + CLOSE + b"\r\n")
        assert answer.statuses == [400], name
        assert b"application/problem+json" in answer.raw, name
        assert b"x-request-id: " in answer.raw, name


async def test_chunks_count_when_a_length_is_given_too(keyed: Live) -> None:
    length, chunks = b"Content-Length: 4\r\n", b"Transfer-Encoding: chunked\r\n"
    for both in (length + chunks, chunks + length):
        answer = await exchange(keyed.port, POST + both + b"\r\n" + CHUNKED + MARK)
        assert answer.statuses == [200], both
        assert b'"profiles"' in answer.raw
        assert b"alive" not in answer.raw, both


async def test_length_counts_when_it_is_repeated_with_the_same_value(keyed: Live) -> None:
    sent = POST + b"Content-Length: 18\r\nContent-Length: 18\r\n\r\n" + BODY + MARK
    assert (await exchange(keyed.port, sent)).statuses == [200, 200]


async def test_body_of_a_get_is_not_read_as_a_request(keyed: Live) -> None:
    hidden = b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n"
    for path in (b"/profiles/u", b"/features", b"/nothing"):
        head = b"GET " + path + b" HTTP/1.1\r\n" + HOST + KEY + b"Content-Length: %d\r\n\r\n" % len(hidden)
        answer = await exchange(keyed.port, head + hidden + MARK)
        assert len(answer.statuses) == 2
        assert b"profiles_http_request" not in answer.raw


async def test_body_is_not_read_as_a_request_when_refused(keyed: Live) -> None:
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


UPGRADES = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
)


async def test_protocol_stays_when_an_upgrade_is_requested(keyed: Live) -> None:
    for upgrade in UPGRADES:
        for key, status in ((KEY, 200), (b"", 401)):
            answer = await exchange(keyed.port, GET + HOST + key + upgrade + b"\r\n" + MARK)
            assert answer.statuses == [status, 200], upgrade


async def test_compressed_chunks_are_refused(keyed: Live) -> None:
    answer = await exchange(keyed.port, POST + b"Transfer-Encoding: gzip, chunked\r\n" + CLOSE + b"\r\n" + CHUNKED)
    assert answer.statuses == [415]


async def test_headers_are_refused_when_they_are_too_many_or_too_long(keyed: Live) -> None:
    many = b"".join(b"X-%d: a\r\n" % number for number in range(2_000))
    for flood in (many, b"X-A: " + b"a" * 1_000_000 + b"\r\n"):
        answer = await exchange(keyed.port, GET + HOST + KEY + flood + b"\r\n" + MARK)
        assert answer.statuses in ([431], [400]), flood[:10]


async def test_target_is_refused_when_it_is_too_long(keyed: Live) -> None:
    answer = await exchange(keyed.port, b"GET /profiles/" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + KEY + b"\r\n")
    assert answer.statuses == [414]


async def test_target_is_refused_when_it_is_not_a_path(keyed: Live) -> None:
    for target in (b"*", b"features", b"localhost:80", b"//features", b"/../features", b"/./features"):
        for method in (b"GET", b"OPTIONS", b"CONNECT"):
            head = method + b" " + target + b" HTTP/1.1\r\n" + HOST + KEY + CLOSE + b"\r\n"
            assert (await exchange(keyed.port, head)).statuses in ([404], [400], [405]), head


async def test_header_is_not_split_by_escapes_of_a_path(keyed: Live) -> None:
    for path in (b"/features", b"/admin/users/a", b"/admin/sign-in?next=/admin"):
        head = b"GET " + path + b"%0d%0aX-Evil:1 HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"
        answer = await exchange(keyed.port, head)
        assert len(answer.statuses) == 1
        assert b"\r\nx-evil" not in answer.raw.lower()
