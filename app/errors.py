"""The exceptions of this service: one tree under `ProfilesError`, declared in the order of the tree.

Retrying helps only after `Unavailable` and its subclasses; after any other error the caller or the operator must change
something. `app.api.problems` maps each class to an HTTP status, and `app.cli.common` to an exit code.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

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

NO_ANSWER = "it does not answer"


class Issue(msgspec.Struct, frozen=True):
    """One fault of an input: its place and the reason."""

    path: Annotated[str, Meta(description="The place in the input, such as `rows[3].as_of` or `line 7`.")]
    detail: Annotated[str, Meta(description="The reason, and what is allowed.")]


class ProfilesError(Exception):
    """The base class of all errors of this service. `issues` lists each fault of an invalid input, else it is empty."""

    def __init__(self, detail: str = "", issues: Sequence[Issue] = ()) -> None:
        super().__init__(detail)
        self.issues = tuple(issues)


class SettingsError(ProfilesError):
    """A setting is missing, malformed or unsafe; the message names the setting and what is allowed."""

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(f"{setting}: {reason}")


class RegistryError(ProfilesError):
    """The feature registry breaks a rule, which the message names. `entry`: the feature, or `*` for the registry."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(f"feature {entry!r}: {reason}" if entry != "*" else f"the registry: {reason}")


class SchemaMismatch(ProfilesError):
    """The schema of the database is older (not migrated) or newer than this program."""


class SpecMismatch(ProfilesError):
    """Stored statistics or an input vector do not fit the model spec (the list of inputs) in use, or are damaged."""


class Undecodable(ProfilesError):
    """The input is not JSON, not UTF-8, or has a query value that is not allowed."""


class InvalidInput(ProfilesError):
    """The input can be decoded but is invalid; `issues` names each place and reason."""


class UnknownFeature(InvalidInput):
    """A feature name that is not in the registry; the message lists the known names."""


class TooLarge(ProfilesError):
    """The request body exceeds the size limit."""


class TooSlow(ProfilesError):
    """The request body did not arrive within `app.api.middleware.body_limits.BODY_S`."""


class UnsupportedMedia(ProfilesError):
    """The route does not support the media type of the body."""


class NotFound(ProfilesError):
    pass


class Conflict(ProfilesError):
    """The request contradicts stored data, or work that is in progress."""


class Unauthenticated(ProfilesError):
    """The request has no API key, or an unknown one."""


class Forbidden(ProfilesError):
    """The API key lacks the required scope."""


class Unavailable(ProfilesError):
    """A dependency does not answer; the same request may succeed later. `public_reason` is the reason without addresses
    and names, for any caller to read; the message is for the log."""

    def __init__(self, detail: str = "", public_reason: str = NO_ANSWER) -> None:
        super().__init__(detail)
        self.public_reason = public_reason


class StoreUnavailable(Unavailable):
    """The database is locked or broken."""


class StoreFull(StoreUnavailable):
    """The database cannot grow: the disk is full, or a quota or limit is reached. Reads continue."""


class Overloaded(Unavailable):
    """The request is rejected because of overload. `kind` names the overloaded part, such as `events` or `reads`."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"too much load ({kind}): nothing was done; try again shortly")
        self.kind = kind


class ModelFailed(Unavailable):
    """The language model returned no usable text. The message, for the log, contains neither API key nor answer."""

    def __init__(
        self, reason: FallbackReason, detail: str, *, well: bool = False, pause_s: float | None = None
    ) -> None:
        """`well`: the model's endpoint works and only this call failed, so the failure does not pause further calls.
        `pause_s`: the seconds for which the endpoint asks its clients to wait; None if it does not ask."""
        super().__init__(detail)
        self.reason = reason
        self.well = well
        self.pause_s = pause_s


class QueueUnavailable(Unavailable):
    pass


class CacheUnavailable(Unavailable):
    """The cache cannot be reached, or its values cannot be trusted at the moment. `slots`: the hash slots of the users
    that are affected; None if all are."""

    slots: frozenset[int] | None = None


class CacheRefused(CacheUnavailable):
    """The cache refuses this command: it is read-only or out of memory."""
