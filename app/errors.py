"""The errors of this service.

    ProfilesError
    ├── SettingsError           a setting is missing, malformed or unsafe
    ├── RegistryError           a feature entry breaks a rule of the registry
    ├── SchemaMismatch          the database is unmigrated, or newer than this program
    ├── SpecMismatch            sufficient statistics of another spec than the one required
    ├── Undecodable             input that is not JSON, not UTF-8, or not allowed in a query
    ├── InvalidInput            input that decodes but is invalid; names the place and the reason
    │   └── UnknownFeature      a feature name that is not in the registry
    ├── TooLarge                a body over the limit
    ├── TooSlow                 a body that arrives too slowly
    ├── UnsupportedMedia        a body of an unsupported media type
    ├── NotFound                the resource does not exist
    ├── Conflict                the request contradicts the stored or running state
    ├── Unauthenticated         no API key, or an unknown one
    ├── Forbidden               an API key without the required scope
    └── Unavailable             a dependency does not answer; retrying may help
        ├── StoreUnavailable    the database is locked or broken
        │   └── StoreFull       the database has no room to write; reads go on
        ├── Overloaded          the request is shed, because it would wait too long
        ├── ModelFailed         the language model returned nothing usable; never leaves the core
        ├── QueueUnavailable    the queue cannot be reached
        └── CacheUnavailable    the cache cannot be reached or must not be used now
            └── CacheRefused    the cache refuses this command (read-only, out of memory)

`Unavailable` errors are worth a retry; the others need a change by the caller or the operator. `app.api.problems` maps
them to HTTP status codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FallbackReason = Literal[
    "timeout",
    "connection failed",
    "rate limited",
    "server error",
    "refused",
    "invalid answer",
    "circuit open",
    "busy",
    "stopping",
    "internal error",
]


@dataclass(frozen=True, slots=True)
class Issue:
    """One fault of an input: `path` is the place (`[3].occurred_at`, `line 7`), `detail` the reason."""

    path: str
    detail: str


class ProfilesError(Exception):
    """The base class of all errors of this service."""


class SettingsError(ProfilesError):
    """A setting is missing, malformed or unsafe; the message names it and what it allows."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting


class RegistryError(ProfilesError):
    """A feature entry breaks a rule; the message names both. The entry `*` is the registry as a whole."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"feature {entry!r}: {reason}" if entry != "*" else f"the registry: {reason}")
        self.entry = entry


class SchemaMismatch(ProfilesError):
    """The database is unmigrated, or newer than this program."""


class SpecMismatch(ProfilesError):
    """Sufficient statistics or a vector belong to another spec, or to none."""


class Undecodable(ProfilesError):
    """The input cannot be decoded."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class InvalidInput(ProfilesError):
    """The input can be decoded but is invalid."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class UnknownFeature(InvalidInput):
    """A feature name that is not in the registry; the message lists the known names."""


class TooLarge(ProfilesError):
    """The body is over the limit."""


class TooSlow(ProfilesError):
    """The body did not arrive in time."""


class UnsupportedMedia(ProfilesError):
    """The route does not support the media type of the body."""


class NotFound(ProfilesError):
    """The resource does not exist."""


class Conflict(ProfilesError):
    """The request contradicts the stored or running state."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class Unauthenticated(ProfilesError):
    """No API key, or an unknown one."""


class Forbidden(ProfilesError):
    """The API key lacks the required scope."""


class Unavailable(ProfilesError):
    """A dependency does not answer; the same request may succeed later.

    `told` is the reason without addresses and names, for any caller to read; the message is for the log.
    """

    def __init__(self, detail: str = "", told: str = "it does not answer") -> None:
        super().__init__(detail)
        self.told = told


class StoreUnavailable(Unavailable):
    """The database is locked or broken, or has no room."""


class StoreFull(StoreUnavailable):
    """The database cannot grow: the disk is full, or a quota or limit is reached. Reads continue."""


class Overloaded(Unavailable):
    """The request is shed. `kind` is the kind of load, from a small closed set."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"too much load ({kind}); nothing was done, try again shortly")
        self.kind = kind


class ModelFailed(Unavailable):
    """The language model returned nothing usable. The message is for the log and contains neither key nor answer."""

    def __init__(
        self, reason: FallbackReason, detail: str, *, well: bool = False, pause_s: float | None = None
    ) -> None:
        """`well`: the endpoint works and only this call failed. `pause_s`: the pause that the endpoint asks for."""
        super().__init__(detail)
        self.reason = reason
        self.well = well
        self.pause_s = pause_s


class QueueUnavailable(Unavailable):
    """The queue cannot be reached."""


class CacheUnavailable(Unavailable):
    """The cache cannot be reached or must not be used now."""


class CacheRefused(CacheUnavailable):
    """The cache refuses this command."""
