"""Sessions: valid cookies, and every way in which a cookie is invalid."""

from __future__ import annotations

import base64
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer

from app.api.auth.sessions import MAX_COOKIE, Session, SessionRecords, Sessions
from app.features.clock import HOUR_MS
from app.settings import hash_key
from app.settings.parsers import ApiKey
from app.stores.sql.access import INSERT_ENDED, KEPT, SqlSessions
from app.stores.sql.database import Database
from tests.support.clock import FakeClock

pytestmark = pytest.mark.both_engines

ADA = ApiKey("ada", frozenset({"admin"}), hash_key("ada's key"))
READER = ApiKey("reader", frozenset({"read"}), hash_key("reader's key"))


class Remembered:
    def __init__(self, secret: str = "s") -> None:
        self._secret = secret
        self._ended: set[str] = set()

    async def secret(self) -> str:
        return self._secret

    async def end(self, session_id: str, expires_at_ms: int, now_ms: int) -> None:
        self._ended.add(session_id)

    async def has_ended(self, session_id: str) -> bool:
        return session_id in self._ended


def sessions(
    *keys: ApiKey, records: SessionRecords | None = None, clock: FakeClock | None = None, hours: int = 2
) -> Sessions:
    return Sessions(
        keys=keys,
        records=records or Remembered(),
        clock=clock or FakeClock(),
        lifetime_hours=hours,
        cookie_name="session",
    )


async def test_session_is_recognised_until_it_expires() -> None:
    clock = FakeClock()
    here = sessions(ADA, clock=clock)
    session = here.begin("ada")
    cookie = await here.cookie(session)
    clock.advance(2 * HOUR_MS - 1)
    assert await here.recognise(cookie) == session
    clock.advance(1)
    assert await here.recognise(cookie) is None


async def test_session_is_recognised_by_every_process_of_the_database() -> None:
    records = Remembered()
    cookie = await sessions(ADA, records=records).cookie(Session("ada", "x", 10**15))
    assert await sessions(ADA, READER, records=records).recognise(cookie) is not None


@pytest.mark.parametrize(
    ("keys", "secret"),
    [
        ((), "s"),
        ((READER,), "s"),
        ((ApiKey("ada", frozenset({"admin"}), hash_key("ada's new key")),), "s"),
        ((ApiKey("ada", frozenset({"read"}), ADA.sha256),), "s"),
        ((ADA,), "another database's"),
    ],
    ids=["no keys", "key removed", "key renewed", "scope lost", "database restored"],
)
async def test_session_is_invalid_when_its_key_or_secret_is_gone(keys: tuple[ApiKey, ...], secret: str) -> None:
    cookie = await sessions(ADA).cookie(Session("ada", "x", 10**15))
    assert await sessions(*keys, records=Remembered(secret)).recognise(cookie) is None


async def test_cookie_is_invalid_when_another_key_signed_it() -> None:
    grace = ApiKey("grace", frozenset({"admin"}), hash_key("grace's key"))
    here = sessions(ADA, grace)
    forged = (await here.signer("ada")).dumps(["grace", "x", 10**15])
    assert await here.recognise(str(forged)) is None
    anonymous = (await here.signer("")).dumps(["ada", "x", 10**15])
    assert await here.recognise(str(anonymous)) is None


@given(st.data())
async def test_cookie_is_invalid_when_a_character_is_changed(data: st.DataObject) -> None:
    here = sessions(ADA)
    cookie = await here.cookie(here.begin("ada"))
    # A character of base64 in last place may hold bits that count for nothing.
    place = data.draw(st.integers(0, len(cookie) - 2))
    # - and + mean the same to the decoder, and _ and /.
    same = cookie[place] + {"-": "+", "_": "/"}.get(cookie[place], "")
    other = data.draw(st.characters(codec="latin-1").filter(lambda found: found not in same))
    assert await here.recognise(cookie[:place] + other + cookie[place + 1 :]) is None


@given(st.one_of(st.none(), st.text(), st.text(alphabet="ABCabc123.-_").map(lambda text: text + ".x")))
async def test_cookie_is_invalid_when_it_is_arbitrary_text(cookie: str | None) -> None:
    assert await sessions(ADA).recognise(cookie) is None


@pytest.mark.parametrize("content", [None, 1, [], ["ada"], ["ada", "x", "soon"], {"name": "ada"}, [["ada"], "x", 1]])
async def test_cookie_is_invalid_when_its_content_has_another_shape(content: object) -> None:
    here = sessions(ADA)
    assert await here.recognise(str((await here.signer("ada")).dumps(content))) is None
    assert await here.recognise(str(URLSafeSerializer("x").dumps(content))) is None


async def test_cookie_is_not_decompressed_when_its_signature_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[bytes] = []
    unpack_really = zlib.decompress

    def unpack(packed: bytes) -> bytes:
        unpacked.append(packed)
        return unpack_really(packed)

    monkeypatch.setattr("itsdangerous.url_safe.zlib.decompress", unpack)
    packed = zlib.compress(b"[" + b"{}," * 200_000 + b"{}]", 9)  # 18 ms of work in less than a kilobyte
    cookie = "." + base64.urlsafe_b64encode(packed).decode().rstrip("=") + ".signature"
    assert len(cookie) <= MAX_COOKIE
    assert await sessions(ADA).recognise(cookie) is None
    assert not unpacked
    ours = sessions(ApiKey("a" * 64, frozenset({"admin"}), hash_key("a")))  # a name that is packed
    assert await ours.recognise(await ours.cookie(ours.begin("a" * 64))) is not None


async def test_token_is_valid_in_one_session() -> None:
    here = sessions(ADA)
    one, other = here.begin("ada"), here.begin("ada")
    assert await here.form_token(one) == await here.form_token(one)
    assert await here.form_token(one) != await here.form_token(other)
    told = await here.recognise(await here.cookie(one._replace(message="done <b>")))
    assert told == one._replace(message="done <b>")


async def test_no_session_is_signed_when_the_secret_is_missing(database: Database) -> None:
    await database.execute("DELETE FROM service WHERE name = 'session_secret'")
    with pytest.raises(TypeError):
        await SqlSessions(database).secret()


async def test_ended_sessions_are_deleted_when_expired_and_many(database: Database) -> None:
    records = SqlSessions(database)
    assert len(await records.secret()) == 64
    await records.end("a", expires_at_ms=100, now_ms=50)
    await records.end("a", expires_at_ms=100, now_ms=50)
    assert await records.has_ended("a")
    assert not await records.has_ended("b")
    await records.end("b", expires_at_ms=300, now_ms=10**15)  # by a clock that is far ahead
    assert await records.has_ended("a")
    others = [(f"other {number}", 200 + number) for number in range(KEPT)]
    await database.write(lambda connection: connection.executemany(INSERT_ENDED, others), of=())
    await records.end("c", expires_at_ms=400, now_ms=150)
    assert not await records.has_ended("a")
    assert await records.has_ended("b")
    await records.end("d", expires_at_ms=400, now_ms=150)
    assert await records.has_ended("other 0"), "it has not expired"
