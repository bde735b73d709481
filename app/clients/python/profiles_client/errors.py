"""The errors of the client: one tree under `ProfilesError`.

`Rejected`: the same request would fail again. `Unavailable`: the same request may succeed later. A read with `default=`
returns the default instead of raising `Unavailable`.
"""

from __future__ import annotations

from msgspec import Struct


class Issue(Struct, frozen=True):
    """One fault of a request: its place, such as `[3].occurred_at`, and the reason."""

    path: str
    detail: str


class Problem(Struct, frozen=True):
    """An error as the service describes it (RFC 9457)."""

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    errors: tuple[Issue, ...] = ()


class ProfilesError(Exception):
    """The base class of all errors. `problem` is None if the error does not come from the service. `request_id` finds
    the request in the service's log."""

    def __init__(
        self,
        detail: str,
        *,
        problem: Problem | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.problem = problem
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    @property
    def issues(self) -> tuple[Issue, ...]:
        """The faults that the service listed; empty if it listed none or did not answer."""
        return self.problem.errors if self.problem is not None else ()


class Rejected(ProfilesError):
    """The service rejected the request (4xx). Sending it again does not help."""


class Malformed(Rejected):
    """400: the request cannot be decoded."""


class Unauthenticated(Rejected):
    """401: the key is missing or unknown."""


class Forbidden(Rejected):
    """403: the key lacks the required scope."""


class NotFound(Rejected):
    """404: the path or the object does not exist. Check the URL of the service."""


class Conflict(Rejected):
    """409: the request contradicts stored data, such as an event id that is stored with other content."""


class TooLarge(Rejected):
    """413: the body exceeds 8 MB."""


class Invalid(Rejected):
    """422: the request is invalid. `issues` names each place and reason."""


class Unavailable(ProfilesError):
    """503 and other 5xx, or no answer: the same call may succeed later."""


class RateLimited(Unavailable):
    """429: the key has used up its requests for now."""


class StorageFull(Unavailable):
    """507: the service cannot store anything at the moment. Reads continue."""


class ConnectionLost(Unavailable):
    """The connection could not be made, or broke before the answer."""


class DeadlineExceeded(Unavailable):
    """The deadline passed before the answer."""


class ContractWarning(UserWarning):
    """The features of the service differ from those that the client was generated for."""


class IncompleteHistory(UserWarning):
    """Some values of a training set could not be computed, and are null."""


BY_STATUS: dict[int, type[ProfilesError]] = {
    400: Malformed,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: Invalid,
    429: RateLimited,
    507: StorageFull,
}
