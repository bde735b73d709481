"""Stores rebuild runs. A unique partial index allows one active run per scope, the set of users to rebuild."""

from __future__ import annotations

import json
from collections.abc import Sequence

from app.profiles.rebuild import KEPT, STALE_MS, Part, RebuildRun, State
from app.stores.sql.cache_state import ADVANCE_LOCAL_CACHE_EPOCH
from app.stores.sql.database import SERVICE, Connection, SqlRepository, writes

_COLUMNS = (
    "id, scope, user_ids, features, total, requested_by, created_at_ms, touched_at_ms, state, done, position, "
    "started_at_ms, finished_at_ms, error"
)
_ACTIVE = "state IN ('queued', 'running')"
INSERT_RUN = f"INSERT INTO rebuilds ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SELECT_ACTIVE = f"SELECT {_COLUMNS} FROM rebuilds WHERE scope = ? AND {_ACTIVE}"
# Without the lists of users, which may contain a thousand ids each.
SELECT_RUNS = f"SELECT {_COLUMNS.replace('user_ids', 'NULL')} FROM rebuilds ORDER BY created_at_ms DESC, id LIMIT ?"
SELECT_IDS = f"SELECT id FROM rebuilds WHERE {_ACTIVE} ORDER BY created_at_ms, id"
# Locks the run, so that the statements after it see every change of its parts.
UPDATE_TOUCHED = f"""
UPDATE rebuilds SET state = 'running', touched_at_ms = :now, started_at_ms = COALESCE(started_at_ms, :now)
WHERE id = :run_id AND {_ACTIVE}
"""
UPDATE_POSITION = "UPDATE rebuilds SET position = :last WHERE id = :run_id AND position = :after"
UPDATE_DONE = "UPDATE rebuilds SET done = done + :users, error = COALESCE(:error, error) WHERE id = :run_id"
INSERT_PART = "INSERT INTO rebuild_parts (run_id, last_user, after_user, claimed_at_ms) VALUES (?, ?, ?, ?)"
_STALE = """FROM rebuild_parts
WHERE run_id = :run_id AND claimed_at_ms NOT BETWEEN CAST(:now AS BIGINT) - :stale AND CAST(:now AS BIGINT) + :stale"""
UPDATE_CLAIM = f"""
UPDATE rebuild_parts SET claimed_at_ms = :now WHERE run_id = :run_id AND last_user = (SELECT MIN(last_user) {_STALE})
RETURNING run_id, last_user, after_user, claimed_at_ms
"""
_PART = "WHERE run_id = :run_id AND last_user = :last AND claimed_at_ms = :claimed_at_ms"
UPDATE_PART = f"UPDATE rebuild_parts SET after_user = :after, claimed_at_ms = :now {_PART}"
UPDATE_RELEASED = f"UPDATE rebuild_parts SET claimed_at_ms = 0 {_PART}"
DELETE_PART = f"DELETE FROM rebuild_parts {_PART}"
SELECT_PART = "SELECT 1 FROM rebuild_parts WHERE run_id = :run_id LIMIT 1"
# The position is a user's id, so it is deleted as soon as the run does not need it; so are the parts.
UPDATE_FINISHED = f"""
UPDATE rebuilds SET position = '', state = :state, finished_at_ms = :now, touched_at_ms = :now,
    error = COALESCE(:error, error)
WHERE id = :run_id AND {_ACTIVE}
"""
DELETE_OLD = f"""
DELETE FROM rebuilds
WHERE NOT {_ACTIVE} AND id NOT IN (SELECT id FROM rebuilds ORDER BY touched_at_ms DESC, id LIMIT :kept)
"""


class SqlRebuildRepository(SqlRepository):
    """Implements `app.profiles.rebuild.RebuildRepository`. Ending a run makes every process clear its local cache."""

    @writes(of=SERVICE)
    def open(self, connection: Connection, run: RebuildRun) -> RebuildRun | None:
        if (active := connection.execute(SELECT_ACTIVE, (run.scope,)).fetchone()) is not None:
            return _run(active)
        row = run._replace(
            user_ids=json.dumps(run.user_ids) if run.user_ids is not None else None,  # type: ignore[arg-type]
            features=json.dumps(run.features),  # type: ignore[arg-type]  # as columns: see `_run`
        )
        connection.execute(INSERT_RUN, row)
        return None

    async def get(self, run_id: str) -> RebuildRun | None:
        row = await self._database.row(f"SELECT {_COLUMNS} FROM rebuilds WHERE id = ?", (run_id,))
        return _run(row) if row else None

    async def newest(self, limit: int) -> list[RebuildRun]:
        return [_run(row) for row in await self._database.rows(SELECT_RUNS, (limit,))]

    async def active(self) -> list[str]:
        return [run_id for (run_id,) in await self._database.rows(SELECT_IDS)]

    @writes(of=())
    def claim(self, connection: Connection, run_id: str, after: str, last: str, now_ms: int) -> Part | None:
        part = Part(run_id, last, after, now_ms)
        for statement in (UPDATE_TOUCHED, UPDATE_POSITION):
            if not connection.execute(statement, {**part._asdict(), "now": now_ms}).rowcount:
                return None
        connection.execute(INSERT_PART, part)
        return part

    async def claim_again(self, run_id: str, now_ms: int) -> Part | None:
        stale = {"run_id": run_id, "now": now_ms, "stale": STALE_MS}

        def work(connection: Connection) -> Part | None:
            if not connection.execute(UPDATE_TOUCHED, stale).rowcount:
                return None
            row = connection.execute(UPDATE_CLAIM, stale).fetchone()
            return Part(*row) if row else None

        if await self._database.value(f"SELECT MIN(last_user) {_STALE}", stale) is None:
            return None
        return await self._database.write(work, of=())

    @writes(of=())
    def advance(
        self, connection: Connection, part: Part, users: int, after: str, now_ms: int, error: str | None = None
    ) -> Part | None:
        done = {**part._asdict(), "after": after, "now": now_ms, "users": users, "error": error}
        if not connection.execute(UPDATE_TOUCHED, done).rowcount:
            connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)  # the run was cancelled while a chunk was rebuilt
            return None
        if not connection.execute(DELETE_PART if after == part.last else UPDATE_PART, done).rowcount:
            return None
        connection.execute(UPDATE_DONE, done)
        return part._replace(after=after, claimed_at_ms=now_ms)

    async def release(self, part: Part) -> None:
        await self._database.execute(UPDATE_RELEASED, part._asdict())

    @writes(of=())
    def finish(self, connection: Connection, run_id: str, state: State, now_ms: int, error: str | None) -> bool:
        end = {"run_id": run_id, "state": state, "now": now_ms, "error": error}
        if state == "completed":
            connection.execute(UPDATE_TOUCHED, end)
            if connection.execute(SELECT_PART, end).fetchone() is not None:
                return False  # another worker rebuilds it, and completes the run
        finished = connection.execute(UPDATE_FINISHED, end).rowcount > 0
        connection.execute("DELETE FROM rebuild_parts WHERE run_id = :run_id", end)
        connection.execute(DELETE_OLD, {"kept": KEPT})
        connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)
        return finished


def _run(row: Sequence[object]) -> RebuildRun:
    run = RebuildRun(*row)  # type: ignore[arg-type]  # columns of a STRICT table
    return run._replace(
        user_ids=json.loads(str(run.user_ids)) if run.user_ids is not None else None,
        features=json.loads(str(run.features)),
    )
