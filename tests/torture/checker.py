"""The checker: does some order of one user's writes explain every answer about that user, at some moment of the answer?

The checker is pure and does not know the service. A history is explained if one total order of the user's writes
satisfies three conditions for each feature of every answer:
  1. A write that was acknowledged before another write began comes before it. The order contains every acknowledged
     write. A write with an unknown outcome may be in the order or not.
  2. A receipt that said "new" or "known" is true at the place of its write.
  3. The value is the value after some prefix of the order, at some moment. The prefix contains every write that was
     acknowledged before the read began, and no write that began after the read was answered. The moment is not before
     what the clock of the process that answered showed when the read began, and at most `SKEW_MS` after what it showed
     when the read was answered.
So a read is never older than the writes acknowledged before it, never newer than the writes begun before its answer,
and all reads agree on one order. While a write is in progress, two reads may differ in whether they see it, whichever
comes first. The service promises no more than that. For the same reason, features with different subjects are judged
separately: after a feedback event is acknowledged, a read may still miss a tip that was stored earlier and is not yet
acknowledged. Clocks may step, so a later read may be of an earlier moment.

The search visits prefixes depth first and remembers the states it has visited. Few writes are concurrent, so the time
is roughly proportional to the length of the history. The tests compare it with an oracle that tries every permutation.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.torture.model import FEATURES, Event, Value, Values, values

BUDGET = 100_000
SKEW_MS = 1_000  # how far ahead the clock of a process may be that filled the cache
OF_SERVED = 1 << FEATURES.index("tip_volume_30d")
OF_FEEDBACK = (1 << len(FEATURES)) - 1 & ~OF_SERVED


class Write(NamedTuple):
    """A change of a user: events are added, or with `erases` all stored events are deleted.

    `events` is a bit mask over the history's events. `end` is None if the outcome is unknown. `new` is True if the
    receipt said that all events were new, and False if it said that all were known.
    """

    start: int
    end: int | None
    events: int
    erases: bool = False
    new: bool | None = None


class Moments(NamedTuple):
    """What a clock may have shown during a read: from `first_ms` to `last_ms`."""

    first_ms: int
    last_ms: int


class Read(NamedTuple):
    """An answer. `seen` has a place for each feature; only those in the bit mask `asked` count. `moments` is what the
    clock of the process that answered may have shown, more than one pair if it stepped meanwhile."""

    call: int
    answer: int
    asked: int
    seen: Sequence[Value]
    moments: Sequence[Moments]


@dataclass(slots=True)
class History:
    """All writes and reads of one user. Their times are nanoseconds of one monotonic clock, except for `moments`."""

    events: list[Event] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


class Unexplained(NamedTuple):
    """An answer that no order explains, with the state of the best attempt: the masks are over the writes, and
    `expected` has the values at the moments of the read."""

    read: Read
    feature: str
    value: Value
    required: int
    allowed: int
    applied: int
    expected: Sequence[Value]


class Verdict(NamedTuple):
    """`explained` is None if the search ran out of its budget. `observations` counts the distinct values judged."""

    explained: bool | None
    observations: int
    states: int
    unexplained: Unexplained | None = None


class _Observation(NamedTuple):
    """`bit` is its own. `in_window` has a mask of the events in the window for each moment of the read that differs."""

    bit: int
    feature: int
    value: Value
    in_window: Sequence[int]
    first: Read


class _Window(NamedTuple):
    """Reads with the same required and allowed writes."""

    required: int
    allowed: int
    bits: int
    observed: Sequence[_Observation]


class _State(NamedTuple):
    applied: int
    alive: int
    pending: int


def check(history: History, budget: int = BUDGET) -> Verdict:
    """Judge one user's history, separately for the features of each subject."""
    verdicts = [_Search(part, budget).run() for part in by_subject(history)]
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.explained])
    return worst._replace(
        observations=sum(verdict.observations for verdict in verdicts),
        states=sum(verdict.states for verdict in verdicts),
    )


def by_subject(history: History) -> list[History]:
    """Split a history into one per subject. A write without events of the subject has an empty mask."""
    views = sum(1 << place for place, event in enumerate(history.events) if event.action is None)
    everything = (1 << len(history.events)) - 1
    return [
        History(
            history.events,
            [write._replace(events=write.events & events) for write in history.writes],
            [read._replace(asked=read.asked & features) for read in history.reads],
        )
        for events, features in ((views, OF_SERVED), (everything & ~views, OF_FEEDBACK))
    ]


class _Search:
    def __init__(self, history: History, budget: int) -> None:
        self._events = history.events
        self._writes = history.writes
        self._budget = budget
        self._known_values: dict[int, Values] = {}
        # Writes that do not change these features take no part in their order.
        relevant = [bool(write.events) or write.erases for write in history.writes]
        self._relevant = sum(1 << index for index, counts in enumerate(relevant) if counts)
        self._before = [mask & self._relevant for mask in _predecessors(history.writes)]
        self._twins = _twins(history.writes)
        self._known = self._relevant & sum(
            1 << index for index, write in enumerate(history.writes) if write.end is not None
        )
        # Acknowledged writes are tried first, in their order. Writes with an unknown outcome are tried last.
        self._order = sorted(
            (index for index, counts in enumerate(relevant) if counts),
            key=lambda index: (history.writes[index].end is None, history.writes[index].end or 0),
        )
        self._windows = _windows(history, self._relevant)
        self._all = sum(window.bits for window in self._windows)
        self._best = (-1, -1)
        self._unexplained: Unexplained | None = None

    def run(self) -> Verdict:
        count = self._all.bit_count()
        seen: set[_State] = set()
        stack = [_State(0, 0, self._all)]
        while stack:
            arrived = self._observe(stack.pop())
            if arrived is None or arrived in seen:
                continue
            seen.add(arrived)
            if len(seen) > self._budget:
                return Verdict(None, count, len(seen), self._unexplained)
            if not arrived.pending and not self._known & ~arrived.applied:
                return Verdict(True, count, len(seen))
            # The last one pushed is tried first.
            following = [self._after(arrived, index) for index in reversed(self._order)]
            further = [state for state in following if state is not None]
            if not further and (window := next((each for each in self._windows if each.bits & arrived.pending), None)):
                self._note_unexplained(arrived, window, arrived.pending)
            stack += further
        return Verdict(False, count, len(seen), self._unexplained)

    def _observe(self, state: _State) -> _State | None:
        """Remove the observations that this prefix explains; None if a pending one can no longer be explained."""
        pending = state.pending
        for window in self._windows:
            if not window.bits & pending:
                continue
            if state.applied & ~window.allowed:
                self._note_unexplained(state, window, pending)
                return None
            if not window.required & ~state.applied:
                for each in window.observed:
                    if each.bit & pending and each.value in self._possible(state, each):
                        pending &= ~each.bit
        return state._replace(pending=pending)

    def _after(self, state: _State, index: int) -> _State | None:
        """The next prefix, with one more write; None if that write cannot come next."""
        write = self._writes[index]
        bit = 1 << index
        if state.applied & bit or (self._before[index] | self._twins[index]) & ~state.applied:
            return None
        if write.new is not None and write.events & (state.alive if write.new else ~state.alive):
            return None
        alive = 0 if write.erases else state.alive | write.events
        if write.end is None and alive == state.alive:
            return None  # the write would change nothing
        return _State(state.applied | bit, alive, state.pending)

    def _possible(self, state: _State, observed: _Observation) -> list[Value]:
        """The values of the feature at the moments of the read."""
        return [self._values_of(state.alive & events)[observed.feature] for events in observed.in_window]

    def _values_of(self, alive: int) -> Values:
        found = self._known_values.get(alive)
        if found is None:
            found = values(event for index, event in enumerate(self._events) if alive >> index & 1)
            self._known_values[alive] = found
        return found

    def _note_unexplained(self, state: _State, window: _Window, pending: int) -> None:
        explained = ((state.applied & self._known).bit_count(), (self._all & ~pending).bit_count())
        if explained <= self._best:
            return
        self._best = explained
        observed = next(each for each in window.observed if each.bit & pending)
        self._unexplained = Unexplained(
            observed.first,
            FEATURES[observed.feature],
            observed.value,
            window.required,
            window.allowed,
            state.applied,
            self._possible(state, observed),
        )


def _predecessors(writes: Sequence[Write]) -> list[int]:
    """For each write, the mask of the writes that were acknowledged before it began."""
    bounds = _Bounds(writes)
    return [bounds.ended_before(write.start) for write in writes]


def _twins(writes: Sequence[Write]) -> list[int]:
    """For each write with an unknown outcome, the mask of earlier unknown writes with the same effect.

    If an order contains the later write and not the earlier one, the order with the two exchanged explains as much, so
    the search tries only the exchanged one.
    """
    order = sorted(range(len(writes)), key=lambda index: (writes[index].start, index))
    seen: dict[tuple[int, bool], int] = {}
    of: dict[int, int] = {}
    for index in order:
        write = writes[index]
        if write.end is None:
            same = (write.events, write.erases)
            of[index] = seen.get(same, 0)
            seen[same] = of[index] | 1 << index
    return [of.get(index, 0) for index in range(len(writes))]


class _Bounds:
    """Masks of the writes that had ended, or begun, at a given time."""

    def __init__(self, writes: Sequence[Write]) -> None:
        ended = sorted((write.end, index) for index, write in enumerate(writes) if write.end is not None)
        begun = sorted((write.start, index) for index, write in enumerate(writes))
        self._ends, self._ended = [end for end, _ in ended], _running(index for _, index in ended)
        self._starts, self._begun = [start for start, _ in begun], _running(index for _, index in begun)

    def ended_before(self, at: int) -> int:
        return self._ended[bisect_left(self._ends, at)]

    def begun_by(self, at: int) -> int:
        return self._begun[bisect_right(self._starts, at)]


def _running(indices: Iterable[int]) -> list[int]:
    masks = [0]
    for index in indices:
        masks.append(masks[-1] | 1 << index)
    return masks


class _Departures:
    """Which events are in the window at a moment. Between two departures, no value changes."""

    def __init__(self, events: Sequence[Event], of_history: int) -> None:
        leaving = sorted((event.leaves_ms, index) for index, event in enumerate(events) if of_history >> index & 1)
        self._times = [leaves_ms for leaves_ms, _ in leaving]
        self._left = _running(index for _, index in leaving)

    def in_window(self, moments: Iterable[Moments]) -> tuple[int, ...]:
        """For each span without a departure, the mask of the events in the window."""
        counts: set[int] = set()
        for first_ms, last_ms in moments:
            first, last = bisect_right(self._times, first_ms), bisect_right(self._times, last_ms + SKEW_MS)
            counts.add(first)
            counts.update(bisect_right(self._times, leaves_ms) for leaves_ms in self._times[first:last])
        return tuple(~self._left[count] for count in sorted(counts))


def _windows(history: History, relevant: int) -> list[_Window]:
    """The distinct observations. Most reads of a user repeat what another read saw."""
    bounds = _Bounds(history.writes)
    of_history = 0
    for write in history.writes:
        of_history |= write.events
    departures = _Departures(history.events, of_history)
    found: dict[tuple[int, int], dict[tuple[int, Value, tuple[int, ...]], Read]] = {}
    for read in history.reads:
        between = (bounds.ended_before(read.call) & relevant, bounds.begun_by(read.answer) & relevant)
        window = found.setdefault(between, {})
        in_window = departures.in_window(read.moments)
        for feature in range(len(FEATURES)):
            if read.asked >> feature & 1:
                window.setdefault((feature, read.seen[feature], in_window), read)
    windows: list[_Window] = []
    number = 0
    for (required, allowed), observed in sorted(found.items(), key=lambda item: item[0][1].bit_count()):
        items = [_Observation(1 << number + place, *key, read) for place, (key, read) in enumerate(observed.items())]
        number += len(items)
        windows.append(_Window(required, allowed, sum(item.bit for item in items), items))
    return windows
