"""Sessions of people in a browser: a signed cookie instead of a key in a header.

The cookie says whose key was shown, a random id, and until when; its signature needs the database's secret *and* the
digest of that key. So a session ends when its key is taken out of the settings, when it expires, or when it is signed
out of, and neither a copy of the database nor the settings alone are enough to forge one. A visitor who has not signed
in has a session, too, under the name `ANYONE`: forms are tied to it. Time and randomness are handed in.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec
from itsdangerous import BadData, URLSafeSerializer

from app.features.clock import Clock
from app.settings.parsers import ApiKey

PATH = "/admin"
ANYONE = ""
HOUR_MS = 3_600_000
MAX_COOKIE = 1_024


class Session(NamedTuple):
    """One visit. `name` is that of the key that was shown, or `ANYONE`."""

    name: str
    id: str
    expires_at_ms: int

    @property
    def signed_in(self) -> bool:
        """Whether a key was shown."""
        return self.name != ANYONE


class SessionRecords(Protocol):
    """What is kept of sessions. Raises `StoreUnavailable`."""

    async def secret(self) -> str:
        """The database's own secret, made when it was."""
        ...

    async def end(self, session_id: str, expires_at_ms: int, now_ms: int) -> None:
        """Let a session be worth nothing from now on."""
        ...

    async def has_ended(self, session_id: str) -> bool:
        """Whether it was signed out of."""
        ...


class _Content(msgspec.Struct, array_like=True):
    """What the cookie holds."""

    name: str
    id: str
    expires_at_ms: int


class Sessions:
    """Begins, recognises and ends sessions."""

    def __init__(
        self,
        *,
        keys: Sequence[ApiKey],
        records: SessionRecords,
        clock: Clock,
        new_id: Callable[[], str],
        lifetime_hours: int,
        instance: str,
    ) -> None:
        """`instance` tells services on one host apart: a browser sends cookies to every port of it."""
        self.cookie_name = f"profiles_session_{instance}"
        self.message_cookie_name = f"profiles_message_{instance}"
        self._digests = {ANYONE: b"", **{key.name: key.sha256 for key in keys if "admin" in key.scopes}}
        self._records = records
        self._clock = clock
        self._new_id = new_id
        self._lifetime_ms = lifetime_hours * HOUR_MS

    def begin(self, name: str = ANYONE) -> Session:
        """A new session. Its id is never one that a visitor brought."""
        return Session(name, self._new_id(), self._clock.now_ms() + self._lifetime_ms)

    async def cookie(self, session: Session) -> str:
        """The cookie's value."""
        content = msgspec.to_builtins(_Content(*session))
        return str((await self._signer(session.name)).dumps(content))

    async def recognise(self, cookie: str | None) -> Session | None:
        """The session of a cookie, or None where it is none of ours, has expired, or was signed out of."""
        if not cookie or len(cookie) > MAX_COOKIE:
            return None
        content = await self._content(cookie)
        if content is None:
            return None
        session = Session(content.name, content.id, content.expires_at_ms)
        if session.expires_at_ms <= self._clock.now_ms():
            return None
        if session.signed_in and await self._records.has_ended(session.id):
            return None
        return session

    async def end(self, session: Session) -> None:
        """Sign out: copies of the cookie are worth nothing, either."""
        await self._records.end(session.id, session.expires_at_ms, self._clock.now_ms())

    async def sign(self, session: Session, text: str) -> str:
        """`text`, signed for this session."""
        return str((await self._signer(session.name)).dumps([session.id, text]))

    async def unsign(self, session: Session, signed: str) -> str | None:
        """What `sign` was given, or None where it was signed for another session, or by another."""
        try:
            session_id, text = (await self._signer(session.name)).loads(signed)
        except (BadData, ValueError, TypeError):
            return None
        return str(text) if session_id == session.id else None

    async def form_token(self, session: Session) -> str:
        """What every form of this session must send along."""
        return hmac.new(await self._key(session.name), b"form:" + session.id.encode(), hashlib.sha256).hexdigest()

    async def _content(self, cookie: str) -> _Content | None:
        """Under each name that may sign, because nothing of a cookie is unpacked before its signature is known."""
        for name in self._digests:
            with suppress(BadData, msgspec.ValidationError):
                content = msgspec.convert((await self._signer(name)).loads(cookie), _Content)
                return content if content.name == name else None
        return None

    async def _key(self, name: str) -> bytes:
        secret = (await self._records.secret()).encode()
        return hmac.new(secret, b"session:" + self._digests[name], hashlib.sha256).digest()

    async def _signer(self, name: str) -> URLSafeSerializer:
        return URLSafeSerializer(
            await self._key(name), salt=b"profiles.session", signer_kwargs={"digest_method": hashlib.sha256}
        )
