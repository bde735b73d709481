"""Stores the roll-out's state and interim analyses ("looks"), and reads the decisions on which the verdict is based.
The column `number` is a decision's sequence number: a later decision has a higher one. The queries read only columns
that stand before the arrays of a row, so that SQLite need not read the row's overflow pages."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from app.bandit.model.inputs import Array
from app.bandit.numpy_on_demand import np
from app.bandit.ports import Counts, RecentDecisions, RolloutLook
from app.bandit.rollout.aggregates import DecisionPage
from app.bandit.rollout.stages import RolloutState, Target
from app.features.events import Action
from app.stores.sql.database import SERVICE, Connection, Database, SqlRepository, reads, writes
from app.telemetry import logger

PAGE = 2_000
NEWEST = 2**63 - 1
log = logger("stores.rollout")

SELECT_STATE = "SELECT stage, share, reason, changed_by, changed_at_ms, evaluated_after, salt, challenger FROM rollout"
# Changes nothing if another process has changed the state since it was read.
UPDATE_STATE = """
UPDATE rollout SET stage = :stage, share = :share, reason = :reason, changed_by = :actor, changed_at_ms = :now,
    evaluated_after = CASE WHEN :anew THEN (SELECT COALESCE(MAX(number), 0) FROM tip_scores) ELSE evaluated_after END,
    salt = CASE WHEN :anew THEN :salt ELSE salt END,
    challenger = CASE WHEN :anew THEN :challenger ELSE COALESCE(challenger, :challenger) END
WHERE stage = :seen_stage AND share = :seen_share AND changed_at_ms = :seen_at
"""
UPDATE_FIRST_PRIOR = """
UPDATE rollout SET challenger = :own, evaluated_after = (SELECT COALESCE(MAX(number), 0) FROM tip_scores)
WHERE stage = 'shadow' AND COALESCE(challenger, :own) = :own
"""
DELETE_LOOKS = "DELETE FROM rollout_looks"
INSERT_LOOK = """
INSERT INTO rollout_looks (number, at_ms, n, body) SELECT :number, :at, :n, :body
WHERE EXISTS (SELECT 1 FROM rollout WHERE evaluated_after = :after) ON CONFLICT DO NOTHING
"""
# Older unsettled decisions will never be settled, so newer ones do not wait for them.
SELECT_FIRST_SINCE = "SELECT number FROM tip_scores WHERE created_at_ms >= ? ORDER BY created_at_ms LIMIT 1"
SELECT_OLDEST_UNSETTLED = """
SELECT number FROM tip_scores
WHERE state IN ('open', 'served') AND number >= ? ORDER BY number LIMIT 1
"""
# Without a condition on `spec_hash`, which the index lacks. So during an upgrade, it counts decisions of both releases.
SELECT_COUNTS = """
SELECT COUNT(champion_p) FILTER (WHERE number < :until), COUNT(champion_p) FILTER (WHERE number >= :until),
    COUNT(*) FILTER (WHERE champion_p IS NULL),
    COUNT(champion_p) FILTER (WHERE role = 'challenger' AND number >= :stage)
FROM tip_scores WHERE state = 'learned' AND explore = 1 AND number > :after
"""
SELECT_NEWEST_PRIOR = "SELECT prior_version FROM tip_scores WHERE number = (SELECT MAX(number) FROM tip_scores)"
# As in `DecisionPage`.
_COLUMNS = f"""number, user_id, COALESCE(reward, 0), CASE role WHEN 'champion' THEN champion_p ELSE challenger_p END,
    champion_p, challenger_p, q_logged, v_champion, v_challenger,
    action IS NOT DISTINCT FROM '{Action.DISMISSED}', agree"""
# Another release has logged its decisions under another spec, and computed their shadows by its challenger.
_EVALUATED = "explore = 1 AND champion_p IS NOT NULL AND spec_hash = COALESCE(:challenger, spec_hash)"
# Without a pooled prior, the challenger hardly differs from the champion, so decisions made without one are excluded.
# They are few: see `begin_evaluation`.
SELECT_PAGE = f"""
SELECT {_COLUMNS}, pool_p, v_pool FROM tip_scores LEFT JOIN pool_shadows USING (number)
WHERE state = 'learned' AND {_EVALUATED} AND number > :after AND number < :until AND prior_version > 0
ORDER BY number LIMIT :limit
"""
SELECT_SHOWN = f"""
SELECT {_COLUMNS}, NULL, NULL, CASE WHEN created_at_ms >= :stage THEN role = 'challenger' END FROM tip_scores
WHERE number > (
        SELECT MAX(number) FROM (SELECT :after AS number UNION ALL SELECT MAX(number) - :among FROM tip_scores) AS low
    )
    AND {_EVALUATED} AND state IN ('served', 'learned')
"""
SELECT_RECENT = """
SELECT elapsed_us / 1000.0, profile_present = 0, role = 'challenger', created_at_ms FROM tip_scores
WHERE created_at_ms >= :since ORDER BY created_at_ms DESC LIMIT :limit
"""


def begin_evaluation(connection: Connection, challenger: str) -> None:
    """Restart the evaluation, if the challenger with this spec hash is in the roll-out, and in the shadow stage. Called
    when the challenger's first pooled prior is stored, because decisions made without a prior do not count. A process
    that found no prior may still store its decision after this restart; `SELECT_PAGE` leaves such a decision out."""
    if connection.execute(UPDATE_FIRST_PRIOR, {"own": challenger}).rowcount:
        connection.execute(DELETE_LOOKS)


class SqlRollout(SqlRepository):
    """The challenger's roll-out and its interim analyses. Implements `app.bandit.ports.RolloutRepository`."""

    def __init__(self, database: Database, challenger: str | None) -> None:
        """`challenger`: the hash of the challenger's spec; None if there is no challenger."""
        super().__init__(database)
        self._challenger = challenger

    async def state(self) -> RolloutState:
        return RolloutState(*await self._database.row(SELECT_STATE))

    @writes(of=SERVICE)
    def move(
        self, connection: Connection, seen: RolloutState, to: Target, reason: str, actor: str, now_ms: int
    ) -> RolloutState | None:
        found = {"seen_stage": seen.stage, "seen_share": seen.share, "seen_at": seen.changed_at_ms}
        change = {"reason": reason, "actor": actor, "now": now_ms, "salt": str(now_ms), "challenger": self._challenger}
        if connection.execute(UPDATE_STATE, {**to._asdict(), **change, **found}).rowcount == 0:
            return None
        if to.anew:
            connection.execute(DELETE_LOOKS)
        return RolloutState(*connection.execute(SELECT_STATE).fetchone())

    async def looks(self) -> list[RolloutLook]:
        rows = await self._database.rows("SELECT number, body FROM rollout_looks ORDER BY number")
        return [look for number, body in rows if (look := _look(number, body)) is not None]

    @writes(of=SERVICE)
    def add_look(self, connection: Connection, look: RolloutLook, seen: RolloutState) -> bool:
        values = {"number": look.number, "at": look.at_ms, "n": look.estimates.n, "after": seen.evaluated_after}
        stored = connection.execute("SELECT number, body FROM rollout_looks WHERE number = :number", values).fetchone()
        if stored is not None and _look(*stored) is None:
            connection.execute("DELETE FROM rollout_looks WHERE number = :number", values)
        body = msgspec.json.encode(look).decode()
        return connection.execute(INSERT_LOOK, {**values, "body": body}).rowcount > 0

    @reads
    def counts(self, connection: Connection, state: RolloutState, overdue_ms: int) -> Counts:
        after = state.evaluated_after
        fresh = max(after, _first_since(connection, overdue_ms))
        oldest = connection.execute(SELECT_OLDEST_UNSETTLED, (fresh,)).fetchone()
        until = NEWEST if oldest is None else int(oldest[0])
        values = {"after": after, "until": until, "stage": _first_since(connection, state.changed_at_ms)}
        counts = Counts(until, *connection.execute(SELECT_COUNTS, values).fetchone())
        # The first prior begins the evaluation anew, so before it no decision counts.
        if connection.execute(SELECT_NEWEST_PRIOR).fetchone() in (None, (0,)):
            counts = counts._replace(evaluated=0, waiting=0, without_prior=counts.evaluated + counts.waiting)
        return counts

    async def pages(self, state: RolloutState, until: int) -> AsyncIterator[DecisionPage]:
        after = state.evaluated_after
        while True:
            values = {"after": after, "until": until, "challenger": state.challenger, "limit": PAGE}
            rows = await self._database.rows(SELECT_PAGE, values)
            if not rows:
                return
            after = rows[-1][0]
            yield _page(rows)

    @reads
    def shown(self, connection: Connection, state: RolloutState, among: int) -> tuple[DecisionPage, Array]:
        stage = {"challenger": state.challenger, "stage": state.changed_at_ms}
        values = {**stage, "after": state.evaluated_after, "among": among}
        rows = connection.execute(SELECT_SHOWN, values).fetchall()
        return _page(rows), np.array([row[-1] for row in rows], np.float64)

    @reads
    def recent(self, connection: Connection, since_ms: int, limit: int) -> RecentDecisions:
        rows = connection.execute(SELECT_RECENT, {"since": since_ms, "limit": limit}).fetchall()
        return RecentDecisions(*np.array(rows, np.float64).reshape(-1, 4).T)


def _first_since(connection: Connection, moment_ms: int) -> int:
    row = connection.execute(SELECT_FIRST_SINCE, (moment_ms,)).fetchone()
    return NEWEST if row is None else int(row[0])


def _look(number: int, body: str) -> RolloutLook | None:
    try:
        return msgspec.json.decode(body, type=RolloutLook)
    except msgspec.MsgspecError as error:
        log.warning("look_unreadable", number=number, error=str(error))
        return None


def _page(rows: Sequence[Sequence[Any]]) -> DecisionPage:
    return DecisionPage([row[1] for row in rows], *np.array([row[2:13] for row in rows], np.float64).reshape(-1, 11).T)
