"""The checker: does some order of one user's writes explain every answer that was given about the user?

Pure, and knows nothing of the service. The rule, for every answer and each feature in it: there is one total order of
the writes such that
  - a write that was acknowledged before another began stands before it; every acknowledged write is in the order, and
    one whose outcome nobody knows is in it or not;
  - a receipt that said "new" or "known" is true where the write stands;
  - the value is that of a prefix of the order which holds every write acknowledged before the read began, and none that
    began after the read was answered.
So a read is never older than what was acknowledged before it, never newer than what had begun, and all reads agree on
what happened in which order. Two reads while a write is under way may differ in whether they see it, whichever came
first: that is the promise, and no more. For the same reason features with different subjects are judged apart: with a
feedback event acknowledged, a read may still miss a tip that was stored before it and is not acknowledged yet.

It searches prefixes depth first and remembers where it has been. What is concurrent is little, so that a user's
history takes time in proportion to its length. The oracle of the tests tries every permutation instead.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.torture.facts import FEATURES, Fact, Value, Values, values

BUDGET = 100_000
OF_SERVED = 1 << FEATURES.index("tip_volume_30d")
OF_FEEDBACK = (1 << len(FEATURES)) - 1 & ~OF_SERVED


class Write(NamedTuple):
    """Something that changes a user: some facts are added, or (`erases`) all that are there go.

    `facts` is a bit mask over the history's facts. `end` None: nobody knows whether, or when, it happened. `new`: the
    receipt said that all its facts were new (True) or all known before (False).
    """

    start: int
    end: int | None
    facts: int
    erases: bool = False
    new: bool | None = None


class Read(NamedTuple):
    """An answer: `seen` has a value for each feature in the bit mask `asked`, and anything for the others."""

    call: int
    answer: int
    asked: int
    seen: Sequence[Value]


@dataclass(slots=True)
class History:
    """Of one user; times are of one monotonic clock."""

    facts: list[Fact] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


class Culprit(NamedTuple):
    """An answer that no order explains, given those that came before; the state of the best attempt at that point."""

    read: Read
    feature: str
    value: Value
    required: int
    allowed: int
    applied: int
    expected: Value


class Verdict(NamedTuple):
    """`explained` None: the budget was spent. `observations`: how many values of how many windows were judged."""

    explained: bool | None
    observations: int
    states: int
    culprit: Culprit | None = None


class _Window(NamedTuple):
    """Reads that had the same writes before and after them: (bit of the observation, feature, value, first read)."""

    required: int
    allowed: int
    bits: int
    observed: Sequence[tuple[int, int, Value, Read]]


class _State(NamedTuple):
    applied: int
    alive: int
    pending: int


def check(history: History, budget: int = BUDGET) -> Verdict:
    """Judge one user's history, by the subject that changes a feature."""
    verdicts = [_Search(part, budget).run() for part in by_subject(history)]
    worst = min(verdicts, key=lambda verdict: {False: 0, None: 1, True: 2}[verdict.explained])
    return worst._replace(
        observations=sum(verdict.observations for verdict in verdicts),
        states=sum(verdict.states for verdict in verdicts),
    )


def by_subject(history: History) -> list[History]:
    """What a history says of the features of each subject. Writes that do not touch them are empty."""
    views = sum(1 << place for place, fact in enumerate(history.facts) if fact.action is None)
    everything = (1 << len(history.facts)) - 1
    return [
        History(
            history.facts,
            [write._replace(facts=write.facts & facts) for write in history.writes],
            [read._replace(asked=read.asked & features) for read in history.reads],
        )
        for facts, features in ((views, OF_SERVED), (everything & ~views, OF_FEEDBACK))
    ]


class _Search:
    def __init__(self, history: History, budget: int) -> None:
        self._facts = history.facts
        self._writes = history.writes
        self._budget = budget
        self._values: dict[int, Values] = {}
        # What does not touch these features has no place in their order.
        touching = [bool(write.facts) or write.erases for write in history.writes]
        self._touching = sum(1 << index for index, touches in enumerate(touching) if touches)
        self._before = [mask & self._touching for mask in _predecessors(history.writes)]
        self._twins = _twins(history.writes)
        self._known = self._touching & sum(
            1 << index for index, write in enumerate(history.writes) if write.end is not None
        )
        # What is acknowledged first is tried first; what nobody knows of, only where that explains nothing.
        self._order = sorted(
            (index for index, touches in enumerate(touching) if touches),
            key=lambda index: (history.writes[index].end is None, history.writes[index].end or 0),
        )
        self._windows = _windows(history, self._touching)
        self._all = sum(window.bits for window in self._windows)
        self._deepest = (-1, -1)
        self._culprit: Culprit | None = None

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
                return Verdict(None, count, len(seen), self._culprit)
            if not arrived.pending and not self._known & ~arrived.applied:
                return Verdict(True, count, len(seen))
            # The last one pushed is tried first.
            following = [self._after(arrived, index) for index in reversed(self._order)]
            further = [state for state in following if state is not None]
            if not further:
                self._stuck(arrived)
            stack += further
        return Verdict(False, count, len(seen), self._culprit)

    def _observe(self, state: _State) -> _State | None:
        """Strike out what this prefix explains; None where it has left something unexplained behind."""
        pending = state.pending
        for window in self._windows:
            if not window.bits & pending:
                continue
            if state.applied & ~window.allowed:
                self._blame(state, window, pending)
                return None
            if not window.required & ~state.applied:
                now = self._of(state.alive)
                for bit, feature, value, _ in window.observed:
                    if now[feature] == value:
                        pending &= ~bit
        return state._replace(pending=pending)

    def _after(self, state: _State, index: int) -> _State | None:
        """The next prefix, with one more write; None where that write cannot come next."""
        write = self._writes[index]
        bit = 1 << index
        if state.applied & bit or (self._before[index] | self._twins[index]) & ~state.applied:
            return None
        if write.new is not None and write.facts & (state.alive if write.new else ~state.alive):
            return None
        alive = 0 if write.erases else state.alive | write.facts
        if write.end is None and alive == state.alive:
            return None  # it would change nothing
        return _State(state.applied | bit, alive, state.pending)

    def _of(self, alive: int) -> Values:
        found = self._values.get(alive)
        if found is None:
            found = values(fact for index, fact in enumerate(self._facts) if alive >> index & 1)
            self._values[alive] = found
        return found

    def _stuck(self, state: _State) -> None:
        for window in self._windows:
            if window.bits & state.pending:
                self._blame(state, window, state.pending)
                return

    def _blame(self, state: _State, window: _Window, pending: int) -> None:
        depth = ((state.applied & self._known).bit_count(), (self._all & ~pending).bit_count())
        if depth <= self._deepest:
            return
        self._deepest = depth
        feature, value, read = next(item[1:] for item in window.observed if item[0] & pending)
        self._culprit = Culprit(
            read,
            FEATURES[feature],
            value,
            window.required,
            window.allowed,
            state.applied,
            self._of(state.alive)[feature],
        )


def _predecessors(writes: Sequence[Write]) -> list[int]:
    """Of each write the mask of those that were acknowledged before it began."""
    bounds = _Bounds(writes)
    return [bounds.ended_before(write.start) for write in writes]


def _twins(writes: Sequence[Write]) -> list[int]:
    """Of each unknown write the mask of earlier ones that would do the same.

    An order that has the later one and not the earlier is no worse with the two exchanged, so it need not be tried.
    """
    order = sorted(range(len(writes)), key=lambda index: (writes[index].start, index))
    seen: dict[tuple[int, bool], int] = {}
    of: dict[int, int] = {}
    for index in order:
        write = writes[index]
        if write.end is None:
            same = (write.facts, write.erases)
            of[index] = seen.get(same, 0)
            seen[same] = of[index] | 1 << index
    return [of.get(index, 0) for index in range(len(writes))]


class _Bounds:
    """Masks of the writes that had ended, or begun, at a moment."""

    def __init__(self, writes: Sequence[Write]) -> None:
        ended = sorted((write.end, index) for index, write in enumerate(writes) if write.end is not None)
        begun = sorted((write.start, index) for index, write in enumerate(writes))
        self._ends, self._ended = [end for end, _ in ended], _running(index for _, index in ended)
        self._starts, self._begun = [start for start, _ in begun], _running(index for _, index in begun)

    def ended_before(self, moment: int) -> int:
        return self._ended[bisect_left(self._ends, moment)]

    def begun_by(self, moment: int) -> int:
        return self._begun[bisect_right(self._starts, moment)]


def _running(indices: Iterable[int]) -> list[int]:
    masks = [0]
    for index in indices:
        masks.append(masks[-1] | 1 << index)
    return masks


def _windows(history: History, touching: int) -> list[_Window]:
    """What was observed, each once. Most reads of a user saw what another one saw already."""
    bounds = _Bounds(history.writes)
    found: dict[tuple[int, int], dict[tuple[int, Value], Read]] = {}
    for read in history.reads:
        between = (bounds.ended_before(read.call) & touching, bounds.begun_by(read.answer) & touching)
        window = found.setdefault(between, {})
        for feature in range(len(FEATURES)):
            if read.asked >> feature & 1:
                window.setdefault((feature, read.seen[feature]), read)
    windows: list[_Window] = []
    number = 0
    for (required, allowed), observed in sorted(found.items(), key=lambda item: item[0][1].bit_count()):
        items = [
            (1 << number + place, feature, value, read)
            for place, ((feature, value), read) in enumerate(observed.items())
        ]
        number += len(items)
        windows.append(_Window(required, allowed, sum(item[0] for item in items), items))
    return windows
