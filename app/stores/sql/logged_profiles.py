"""Reads the profiles that are stored with decisions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from app.features.ids import id_problem
from app.features.registry import ProfileRead, Scalar
from app.profiles.ports import LoggedProfile
from app.stores.sql.damaged_rows import readable
from app.stores.sql.database import SqlRepository

_SELECT = "SELECT number, decision_id, user_id, profile_origin, request, profile_read FROM tip_scores"
SELECT_NEWEST = f"{_SELECT} WHERE number > :after AND number < :before ORDER BY number DESC LIMIT :limit"
SELECT_BY_IDS = f"{_SELECT} WHERE decision_id IN (SELECT value FROM json_each(?))"


class _Request(msgspec.Struct):
    profile: dict[str, Scalar] | None


# Not with `->>`: PostgreSQL would decode every string of the request, and fail if one contains NUL.
_decode = msgspec.json.Decoder(_Request).decode
_decode_read = msgspec.json.Decoder(ProfileRead).decode


class SqlLoggedProfiles(SqlRepository):
    """The profiles of stored decisions. Implements `app.profiles.ports.LoggedProfiles`."""

    async def newest(self, limit: int, *, after: int = 0, before: int = sys.maxsize) -> list[LoggedProfile]:
        rows = await self._database.rows(SELECT_NEWEST, {"after": after, "before": before, "limit": limit})
        return _readable(rows)

    async def by_id(self, decision_ids: Sequence[str]) -> Mapping[str, LoggedProfile]:
        possible = [one for one in decision_ids if id_problem(one) is None]  # PostgreSQL rejects NUL
        rows = await self._database.rows(SELECT_BY_IDS, (json.dumps(possible),))
        return {found.decision_id: found for found in _readable(rows)}


def profile_read_of(stored: str | None) -> ProfileRead | None:
    return None if stored is None else _decode_read(stored)


def _readable(rows: Iterable[Sequence[Any]]) -> list[LoggedProfile]:
    return [found for row in rows if (found := readable(row[0], _logged, *row)) is not None]


def _logged(number: int, decision_id: str, user_id: str, origin: str, request: str, read: str | None) -> LoggedProfile:
    return LoggedProfile(number, decision_id, user_id, origin, _decode(request).profile or {}, profile_read_of(read))
