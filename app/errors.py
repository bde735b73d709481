"""Every error this service raises on purpose, as one tree.

    ProfilesError
    ├── SettingsError           a setting is missing, malformed or unsafe
    ├── RegistryError           a feature entry breaks a rule of the registry
    ├── SchemaMismatch          the database is unmigrated, or newer than this program
    ├── SpecMismatch            learned evidence of another feature spec than is asked of it
    ├── Undecodable             input that is not JSON, not UTF-8, or not a value the query allows
    ├── InvalidInput            input that decodes and is still wrong; says where and why
    │   └── UnknownFeature      a feature name that the registry does not have
    ├── TooLarge                a body over the limit
    ├── TooSlow                 a body that does not come in
    ├── UnsupportedMedia        a body of another kind than the route reads
    ├── NotFound                the thing named does not exist
    ├── Conflict                the request contradicts what is stored or running
    ├── Unauthenticated         no key, or a key that is not known
    ├── Forbidden               a known key without the scope
    └── Unavailable             something outside does not answer; worth trying again
        ├── StoreUnavailable    the database is locked or broken
        │   └── StoreFull       the database has no room to write; reads go on
        ├── Overloaded          more is asked for than can be done in good time; says of what
        ├── ModelFailed         the language model gave nothing that can be used; never leaves the core
        ├── QueueUnavailable    the queue cannot be reached
        └── CacheUnavailable    the cache cannot be reached, or is not to be used now
            └── CacheRefused    the cache answers, but refuses this command (read-only, out of memory)

Callers catch by branch: `Unavailable` is retried, everything else is the caller's or the operator's to mend.
This module knows nothing of HTTP; `app.api.problems` maps the tree to status codes.
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
    """One thing wrong with an input: `path` names the place (`[3].occurred_at`, `line 7`), `detail` the reason."""

    path: str
    detail: str


class ProfilesError(Exception):
    """Root of the tree."""


class SettingsError(ProfilesError):
    """Names the setting and what it allows."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")
        self.setting = setting


class RegistryError(ProfilesError):
    """Names the entry and the rule it breaks; `*` is the registry as a whole."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"feature {entry!r}: {reason}" if entry != "*" else f"the registry: {reason}")
        self.entry = entry


class SchemaMismatch(ProfilesError):
    """The database and this program disagree about the schema."""


class SpecMismatch(ProfilesError):
    """Evidence, or a vector, is of another feature spec, or cannot be of any: refused, never mixed."""


class Undecodable(ProfilesError):
    """The input cannot even be read."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class InvalidInput(ProfilesError):
    """The input can be read and is wrong."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class UnknownFeature(InvalidInput):
    """A name that the registry does not have; the message lists those it has."""


class TooLarge(ProfilesError):
    """The body is over the limit."""


class TooSlow(ProfilesError):
    """The body does not come in within its time."""


class UnsupportedMedia(ProfilesError):
    """The body is of a kind that the route does not read."""


class NotFound(ProfilesError):
    """The thing named does not exist."""


class Conflict(ProfilesError):
    """The request contradicts what is stored or running."""

    def __init__(self, detail: str, issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class Unauthenticated(ProfilesError):
    """No key, or one that is not known."""


class Forbidden(ProfilesError):
    """A known key without the scope."""


class Unavailable(ProfilesError):
    """Something outside does not answer; the same request may succeed later.

    `told` is what anybody may read of the reason, without addresses and names; the message is for the log.
    """

    def __init__(self, detail: str = "", told: str = "it does not answer") -> None:
        super().__init__(detail)
        self.told = told


class StoreUnavailable(Unavailable):
    """The database is locked or broken, or has no room."""


class StoreFull(StoreUnavailable):
    """There is no room to write to the database: the disk is full, or a quota or limit is reached. Reads go on."""


class Overloaded(Unavailable):
    """More is asked for than can be done in good time. `kind` is what there is too much of, of a small closed set."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"too much load ({kind}); nothing was done, try again shortly")
        self.kind = kind


class ModelFailed(Unavailable):
    """The language model gave nothing that can be used. The message is for the log: no key, nothing of the answer."""

    def __init__(
        self, reason: FallbackReason, detail: str, *, well: bool = False, pause_s: float | None = None
    ) -> None:
        """`well`: its endpoint works, and this call was at fault. `pause_s`: how long it asks to be left alone."""
        super().__init__(detail)
        self.reason = reason
        self.well = well
        self.pause_s = pause_s


class QueueUnavailable(Unavailable):
    """The queue cannot be reached."""


class CacheUnavailable(Unavailable):
    """The cache cannot be reached, or is not to be used now."""


class CacheRefused(CacheUnavailable):
    """The cache answers, but refuses this command."""
