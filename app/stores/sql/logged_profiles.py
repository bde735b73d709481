"""Reads the profiles that are stored with decisions, and skips damaged rows, so that these affect no others."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from app.features.ids import id_problem
from app.features.registry import ProfileRead, Scalar
from app.profiles.ports import LoggedProfile
from app.stores.sql.database import Connection, SqlRepository, named_rows, reads
from app.telemetry import logger

T = TypeVar("T")
# What the decoding of a damaged row raises, and the computation with the values in it.
DAMAGE: Final = (msgspec.MsgspecError, ValueError, LookupError, ArithmeticError)
_SELECT = "SELECT number, decision_id, user_id, profile_origin, request, profile_read FROM tip_scores"
SELECT_NEWEST = f"{_SELECT} WHERE number > :after AND number < :before ORDER BY number DESC LIMIT :limit"
SELECT_BY_IDS = f"{_SELECT} WHERE decision_id IN (SELECT value FROM json_each(?))"
log = logger("stores.decisions")


class _Request(msgspec.Struct):
    profile: dict[str, Scalar] | None


# Not with `->>`: PostgreSQL would decode every string of the request, and fail if one contains NUL.
_decode = msgspec.json.Decoder(_Request).decode
_decode_read = msgspec.json.Decoder(ProfileRead).decode


def readable(rows: Iterable[dict[str, Any]], decode: Callable[[dict[str, Any]], T]) -> list[T]:
    """Decode rows of `tip_scores`, mappings by column. Leave damaged ones out, and log their decision numbers."""
    found: list[T] = []
    for row in rows:
        try:
            found.append(decode(row))
        except DAMAGE as error:
            log.warning("decision_unreadable", number=row["number"], error=str(error))
    return found


def profile_read_of(stored: str | None) -> ProfileRead | None:
    return None if stored is None else _decode_read(stored)


class SqlLoggedProfiles(SqlRepository):
    """The profiles of stored decisions. Implements `app.profiles.ports.LoggedProfiles`."""

    @reads
    def newest(
        self, connection: Connection, limit: int, *, after: int = 0, before: int = sys.maxsize
    ) -> list[LoggedProfile]:
        place = {"after": after, "before": before, "limit": limit}
        return readable(named_rows(connection, SELECT_NEWEST, place), _logged)

    @reads
    def by_id(self, connection: Connection, decision_ids: Sequence[str]) -> Mapping[str, LoggedProfile]:
        possible = [one for one in decision_ids if id_problem(one) is None]  # PostgreSQL rejects NUL
        rows = named_rows(connection, SELECT_BY_IDS, (json.dumps(possible),))
        return {found.decision_id: found for found in readable(rows, _logged)}


def _logged(row: Mapping[str, Any]) -> LoggedProfile:
    profile, read = _decode(row["request"]).profile or {}, profile_read_of(row["profile_read"])
    return LoggedProfile(row["number"], row["decision_id"], row["user_id"], row["profile_origin"], profile, read)
