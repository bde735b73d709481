"""Stores measurements of data quality and their reports. A unique partial index allows one active run at a time."""

from __future__ import annotations

from app.profiles.quality.report import KEPT, STALE_MS, QualityRun, RunState
from app.stores.sql.database import SERVICE, Connection, SqlRepository, writes

_BEFORE_BODY = "id, state, requested_by, requested_at_ms, started_at_ms, finished_at_ms, done, "
_COLUMNS = f"{_BEFORE_BODY}body, error"
_ACTIVE = "state IN ('queued', 'running')"
SELECT_ACTIVE = f"SELECT {_COLUMNS} FROM quality_reports WHERE {_ACTIVE}"
INSERT_RUN = f"""
INSERT INTO quality_reports (state, requested_by, requested_at_ms, touched_at_ms) VALUES ('queued', :by, :now, :now)
RETURNING {_COLUMNS}
"""
SELECT_RUNS = f"SELECT {_BEFORE_BODY}NULL, error FROM quality_reports ORDER BY id DESC LIMIT ?"
SELECT_COMPLETED = f"SELECT {_COLUMNS} FROM quality_reports WHERE state = 'completed' ORDER BY id DESC LIMIT 1"
UPDATE_BEGUN = """
UPDATE quality_reports SET state = 'running', touched_at_ms = :now, started_at_ms = :now
WHERE id = :id AND (state = 'queued' OR state = 'running'
    AND touched_at_ms NOT BETWEEN CAST(:now AS BIGINT) - :stale AND CAST(:now AS BIGINT) + :stale)
"""
UPDATE_RELEASED = "UPDATE quality_reports SET state = 'queued' WHERE id = ? AND state = 'running'"
UPDATE_FINISHED = f"""
UPDATE quality_reports SET state = :state, finished_at_ms = :now, touched_at_ms = :now, done = :measured, body = :body,
    error = NULLIF(:error, '')
WHERE id = :id AND {_ACTIVE}
"""
# The newest report is kept, however many runs have failed after it.
DELETE_OLD = """
DELETE FROM quality_reports
WHERE state IN ('completed', 'failed')
    AND id NOT IN (SELECT id FROM quality_reports ORDER BY id DESC LIMIT :kept)
    AND id IS DISTINCT FROM (SELECT MAX(id) FROM quality_reports WHERE state = 'completed')
"""


class SqlQualityRepository(SqlRepository):
    """The runs that measure data quality. Implements `app.profiles.quality.report.QualityRepository`."""

    @writes(of=SERVICE)
    def open(self, connection: Connection, requested_by: str, now_ms: int) -> tuple[QualityRun, bool]:
        active = connection.execute(SELECT_ACTIVE).fetchone()
        row = active or connection.execute(INSERT_RUN, {"by": requested_by, "now": now_ms}).fetchone()
        return QualityRun(*row), active is None

    async def newest(self, limit: int) -> list[QualityRun]:
        return [QualityRun(*row) for row in await self._database.rows(SELECT_RUNS, (limit,))]

    async def newest_completed(self) -> QualityRun | None:
        row = await self._database.row(SELECT_COMPLETED)
        return QualityRun(*row) if row else None

    async def begin(self, run_id: int, now_ms: int) -> bool:
        begun = {"id": run_id, "now": now_ms, "stale": STALE_MS}
        return await self._database.execute(UPDATE_BEGUN, begun) > 0

    async def release(self, run_id: int) -> None:
        await self._database.execute(UPDATE_RELEASED, (run_id,))

    async def finish(
        self, run_id: int, state: RunState, now_ms: int, *, measured: int = 0, body: str | None = None, error: str = ""
    ) -> bool:
        values = {"id": run_id, "state": state, "now": now_ms, "measured": measured, "body": body, "error": error}

        def work(connection: Connection) -> bool:
            ended = connection.execute(UPDATE_FINISHED, values).rowcount > 0
            connection.execute(DELETE_OLD, {"kept": KEPT})
            return ended

        return await self._database.write(work, of=())
