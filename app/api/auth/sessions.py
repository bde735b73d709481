"""Browser sessions: a signed cookie instead of a key in a header.

The cookie is signed with the database's secret *and* the digest of the API key that was used to sign in. So a session
ends when it expires, when the visitor signs out, or when the key is removed from the settings. Before sign-in, a
session has an empty name; it exists so that the sign-in form has a CSRF token, too.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec
from itsdangerous import BadData, URLSafeSerializer

from app.features.clock import HOUR_MS, Clock
from app.settings.parsers import ApiKey

PATH = "/admin"
NOT_SIGNED_IN = ""
MAX_COOKIE = 4_096  # browsers store no longer ones


class Session(NamedTuple):
    """The contents of a session cookie. `name` is that of the API key used to sign in, or `NOT_SIGNED_IN`. `message` is
    shown by the next page: the result of a form."""

    name: str
    id: str
    expires_at_ms: int
    message: str = ""

    @property
    def signed_in(self) -> bool:
        return self.name != NOT_SIGNED_IN


class SessionRecords(Protocol):
    """Stores the signing secret and the ended sessions in the database. Its methods raise `StoreUnavailable`."""

    async def secret(self) -> str:
        """The secret that was generated when the database was created."""

    async def end(self, session_id: str, expires_at_ms: int, now_ms: int) -> None:
        """Record that the session has ended. The record is kept until the session would have expired."""

    async def has_ended(self, session_id: str) -> bool: ...


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """Begins, recognises and ends sessions. `cookie_name` differs between databases, because a browser sends a host's
    cookies to each of its ports."""

    keys: Sequence[ApiKey]
    records: SessionRecords
    clock: Clock
    lifetime_hours: int
    cookie_name: str

    def begin(self, name: str = NOT_SIGNED_IN) -> Session:
        """Start a session with a new id; reusing the id of an earlier cookie would allow session fixation."""
        expires_at_ms = self.clock.now_ms() + self.lifetime_hours * HOUR_MS
        return Session(name, secrets.token_urlsafe(16), expires_at_ms)

    async def cookie(self, session: Session) -> str:
        return str((await self.signer(session.name)).dumps(session))

    async def recognise(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if the signature is invalid, or the session has expired or ended."""
        if not cookie or len(cookie) > MAX_COOKIE:
            return None
        session = await self._verified(cookie)
        if session is None or session.expires_at_ms <= self.clock.now_ms():
            return None
        return None if session.signed_in and await self.records.has_ended(session.id) else session

    async def end(self, session: Session) -> None:
        """End a session: its cookie and all copies of the cookie become invalid."""
        await self.records.end(session.id, session.expires_at_ms, self.clock.now_ms())

    async def form_token(self, session: Session) -> str:
        """The anti-CSRF token that every form of this session must contain."""
        return hmac.new(await self._key(session.name), b"form:" + session.id.encode(), hashlib.sha256).hexdigest()

    async def _verified(self, cookie: str) -> Session | None:
        # The name is inside the signed part, which is not decoded before it is verified. So every key is tried.
        for name in (NOT_SIGNED_IN, *(key.name for key in self.keys if "admin" in key.scopes)):
            with suppress(BadData, msgspec.ValidationError):
                session = msgspec.convert((await self.signer(name)).loads(cookie), Session)
                return session if session.name == name else None
        return None

    async def _key(self, name: str) -> bytes:
        digest = next((key.sha256 for key in self.keys if key.name == name), b"")
        secret = (await self.records.secret()).encode()
        return hmac.new(secret, b"session:" + digest, hashlib.sha256).digest()

    async def signer(self, name: str) -> URLSafeSerializer:
        return URLSafeSerializer(
            await self._key(name), salt=b"profiles.session", signer_kwargs={"digest_method": hashlib.sha256}
        )
