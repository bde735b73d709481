"""A reference implementation of the five features in plain Python, which the SQL must equal.

It is slow and simple: one list of events and arithmetic by `datetime`. It shares only the type of a stored event with
the code under test.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from app.events.ports import Admitted
from app.features.events import TipFeedback, TipServed

THIRTY_DAYS_MS = 30 * 24 * 60 * 60 * 1000
Value = float | int | None


def profile(
    facts: Sequence[Admitted], user_id: str, now_ms: int, known_ms: int | None = None, *, live: bool = False
) -> dict[str, Value]:
    """A user's features at `now_ms`, from events received by `known_ms`. With `live`, later events count, too."""
    seen = [
        fact
        for fact in facts
        if fact.event.user_id == user_id
        and now_ms - THIRTY_DAYS_MS < fact.occurred_at_ms
        and (live or fact.occurred_at_ms <= now_ms)
        and (known_ms is None or fact.received_at_ms <= known_ms)
    ]
    reactions = [(fact, fact.event) for fact in seen if isinstance(fact.event, TipFeedback)]
    actions: list[str] = [event.action for _, event in reactions]
    dwells = [event.dwell_ms for _, event in reactions if event.dwell_ms is not None]
    return {
        "completion_rate_30d": actions.count("completed") / len(actions) if actions else None,
        "dismiss_rate_30d": actions.count("dismissed") / len(actions) if actions else None,
        "mean_dwell_ms_30d": sum(dwells) / len(dwells) if dwells else None,
        "preferred_hour": _preferred_hour([fact for fact, event in reactions if event.action == "completed"]),
        "tip_volume_30d": sum(1 for fact in seen if isinstance(fact.event, TipServed)),
    }


def _preferred_hour(completed: Sequence[Admitted]) -> int | None:
    best: int | None = None
    best_rank = (0, 0)
    for hour in range(24):  # ascending, so that the smaller hour wins a tie
        times = [fact.occurred_at_ms for fact in completed if _local_hour(fact) == hour]
        if times and (len(times), max(times)) > best_rank:
            best, best_rank = hour, (len(times), max(times))
    return best


def _local_hour(fact: Admitted) -> int:
    offset = fact.event.occurred_at.utcoffset()
    assert offset is not None
    wall = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=fact.occurred_at_ms) + offset
    return wall.hour
