"""Stores rebuild runs. A unique partial index allows one active run per scope, the set of users to rebuild."""

from __future__ import annotations

import json
from collections.abc import Sequence

from app.profiles.rebuild.runs import ACTIVE, RebuildRun, State
from app.stores.sql.database import SERVICE, Connection, Database
from app.stores.sql.local_cache_epoch import ADVANCE_LOCAL_CACHE_EPOCH

_COLUMNS = (
    "id, scope, user_ids, features, state, done, total, position, requested_by, "
    "created_at_ms, started_at_ms, touched_at_ms, finished_at_ms, error"
)
INSERT_RUN = f"INSERT INTO rebuilds ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SELECT_ACTIVE = f"SELECT {_COLUMNS} FROM rebuilds WHERE scope = ? AND state IN ('queued', 'running')"
SELECT_RUN = f"SELECT {_COLUMNS} FROM rebuilds WHERE id = ?"
# Without the lists of users, which may contain a thousand ids each.
SELECT_RUNS = f"SELECT {_COLUMNS.replace('user_ids', 'NULL')} FROM rebuilds ORDER BY created_at_ms DESC, id LIMIT ?"
SELECT_UNTOUCHED = (
    "SELECT id FROM rebuilds WHERE state IN ('queued', 'running') AND (touched_at_ms < ? OR touched_at_ms > ?)"
)
UPDATE_PROGRESS = """
UPDATE rebuilds SET state = 'running', done = :done, position = :position, touched_at_ms = :now,
    started_at_ms = COALESCE(started_at_ms, :now)
WHERE id = :id AND state IN ('queued', 'running')
"""
SELECT_STATE = "SELECT state FROM rebuilds WHERE id = ?"
# The position is a user's id, so it is deleted as soon as the run does not need it.
UPDATE_FINISHED = """
UPDATE rebuilds SET position = '', state = ?, finished_at_ms = ?, touched_at_ms = ?, error = ?
WHERE id = ? AND state IN ('queued', 'running')
"""


class SqlRebuildRepository:
    """The rebuild runs. Implements `app.profiles.rebuild.runs.RebuildRepository`. The transaction that ends a run also
    makes every process clear its local cache."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def open(self, run: RebuildRun) -> RebuildRun | None:
        row = run._replace(
            user_ids=json.dumps(run.user_ids) if run.user_ids is not None else None,  # type: ignore[arg-type]
            features=json.dumps(run.features),  # type: ignore[arg-type]  # as columns: see `_run`
        )

        def work(connection: Connection) -> RebuildRun | None:
            active = connection.execute(SELECT_ACTIVE, (run.scope,)).fetchone()
            if active is not None:
                return _run(active)
            connection.execute(INSERT_RUN, row)
            return None

        return await self._database.write(work, of=SERVICE)

    async def get(self, run_id: str) -> RebuildRun | None:
        row = await self._database.row(SELECT_RUN, (run_id,))
        return _run(row) if row else None

    async def newest(self, limit: int) -> list[RebuildRun]:
        return [_run(row) for row in await self._database.rows(SELECT_RUNS, (limit,))]

    async def untouched(self, before_ms: int, after_ms: int) -> list[str]:
        return [run_id for (run_id,) in await self._database.rows(SELECT_UNTOUCHED, (before_ms, after_ms))]

    async def advance(self, run_id: str, done: int, position: str, now_ms: int) -> State:
        def work(connection: Connection) -> State:
            connection.execute(UPDATE_PROGRESS, {"id": run_id, "done": done, "position": position, "now": now_ms})
            row: tuple[State] | None = connection.execute(SELECT_STATE, (run_id,)).fetchone()
            state: State = row[0] if row else "cancelled"
            if state not in ACTIVE:  # it was cancelled while a page was rebuilt
                connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)
            return state

        return await self._database.write(work, of=())

    async def finish(self, run_id: str, state: State, now_ms: int, error: str | None) -> bool:
        def work(connection: Connection) -> bool:
            finished = connection.execute(UPDATE_FINISHED, (state, now_ms, now_ms, error, run_id)).rowcount > 0
            connection.execute(ADVANCE_LOCAL_CACHE_EPOCH)
            return finished

        return await self._database.write(work, of=())


def _run(row: Sequence[object]) -> RebuildRun:
    run = RebuildRun(*row)  # type: ignore[arg-type]  # columns of a STRICT table
    return run._replace(
        user_ids=json.loads(str(run.user_ids)) if run.user_ids is not None else None,
        features=json.loads(str(run.features)),
    )
