"""Records of a run: each user's history, the counters of the whole run, and the text of a violation."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.torture.checker import History, Read, Unexplained, Verdict, Write, check
from tests.torture.model import FEATURES, Event

MAX_WRITES = 40
MAX_READS = 6_000
CONTEXT_READS = 12
CONTEXT_WRITES = 30
SHOWN_VIOLATIONS = 20


class FaultSpan(NamedTuple):
    start: int
    end: int
    name: str


@dataclass(slots=True)
class UserRecord:
    """The history of one user.

    `erasable` users are erased now and then. They get no events by the queue, because a job that is repeated after the
    erasure would store its events again. `by_queue` maps an event that is not known to be consumed to the index of its
    write.
    """

    user_id: str
    erasable: bool
    history: History = field(default_factory=History)
    in_progress: int = 0
    by_queue: dict[str, int] = field(default_factory=dict)
    indices: dict[str, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether the history is long enough to be judged and replaced by that of a new user."""
        history = self.history
        return len(history.writes) >= MAX_WRITES or len(history.reads) >= MAX_READS

    def bit(self, event: Event) -> int:
        """The bit of an event in the masks of writes."""
        index = self.indices.get(event.event_id)
        if index is None:
            index = self.indices[event.event_id] = len(self.history.events)
            self.history.events.append(event)
        return 1 << index


@dataclass(slots=True)
class RunRecord:
    """The counters and the violations of a run."""

    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    spans: list[FaultSpan] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    undecided: int = 0
    users: int = 0
    answers: int = 0
    observations: int = 0
    states: int = 0
    acknowledged: set[str] = field(default_factory=set)
    decisions: set[str] = field(default_factory=set)
    sent: set[str] = field(default_factory=set)
    slowest_s: float = 0.0
    metrics: Counter[str] = field(default_factory=Counter)
    memory: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_at_first: bool = False

    def violated(self, text: str) -> None:
        self.violations.append(text)
        if self.stop_at_first:
            self.stop.set()

    def judge(self, user: UserRecord) -> None:
        verdict = check(user.history)
        self.users += 1
        self.answers += len(user.history.reads)
        self.observations += verdict.observations
        self.states += verdict.states
        if verdict.explained is None:
            self.undecided += 1
        elif not verdict.explained:
            self.violated(explain(user, verdict, self.spans))

    def summary(self) -> str:
        lines = [f"{self.operations.total():,d} operations"]
        lines += [f"  {count:9,d}  {name}" for name, count in self.operations.most_common()]
        lines += [f"{self.answers:,d} profiles of {self.users:,d} users in answers, checked as"]
        lines += [f"  {self.observations:,d} different observations in {self.states:,d} states"]
        lines += ["answers by status"]
        lines += [f"  {count:9,d}  {name}" for name, count in sorted(self.statuses.items())]
        lines += [f"  {count:9,d}  {name}, no answer" for name, count in sorted(self.unanswered.items())]
        lines += [f"{self.faults.total():,d} faults"]
        lines += [
            f"  {self.faults[name]:6d}  {name}" + (f"  ({self.skipped[name]} skipped)" if self.skipped[name] else "")
            for name in sorted({*self.faults, *self.skipped})
        ]
        lines += ["counters of the API processes that ran at the end"]
        lines += [f"  {count:9,d}  {name}" for name, count in self.metrics.items()]
        lines += self.memory
        lines += [f"slowest answer {self.slowest_s:.1f} s", f"{self.undecided} users undecided"]
        lines += [f"{len(self.violations)} violations", *(f"\n{text}" for text in self.violations[:SHOWN_VIOLATIONS])]
        return "\n".join(lines)


def explain(user: UserRecord, verdict: Verdict, spans: list[FaultSpan]) -> str:
    """Describe a violation: the unexplained answer, with the writes, reads and faults around it in order of time."""
    history, unexplained = user.history, verdict.unexplained
    if unexplained is None:
        return f"{user.user_id}: no order of its writes is possible\n  " + "\n  ".join(map(repr, history.writes))
    zero = unexplained.read.call
    lines = [
        f"{user.user_id}: {unexplained.feature} was answered as {unexplained.value!r}, and no order explains it.",
        f"Writes acknowledged before the read began: {_indices(unexplained.required)}; begun before it was answered: "
        f"{_indices(unexplained.allowed)}; applied in the best attempt: {_indices(unexplained.applied)}, "
        f"which gives {' or '.join(map(repr, dict.fromkeys(unexplained.expected)))}.",
        "Times in ms since the read began; the wall clock of its process showed the times after `at`, and events leave "
        "the window at the times after `leaves`.",
    ]
    rows = [*_writes_around(history, unexplained.read), *_reads_around(history, unexplained)]
    rows += [
        (span.start, f"fault     {_interval(span.start, span.end, zero)}  {span.name}")
        for span in spans
        if span.end > zero - 3_000_000_000 and span.start < zero + 1_000_000_000
    ]
    return "\n  ".join([*lines, *(text for _, text in sorted(rows))])


def _writes_around(history: History, read: Read) -> list[tuple[int, str]]:
    zero = read.call
    rows = [
        (
            write.start,
            f"write {number:2d}  {_interval(write.start, write.end, zero)}  {_describe(history, write, read)}",
        )
        for number, write in enumerate(history.writes)
    ]
    return sorted(rows, key=lambda row: abs(row[0] - zero))[:CONTEXT_WRITES]


def _reads_around(history: History, unexplained: Unexplained) -> list[tuple[int, str]]:
    feature, zero = FEATURES.index(unexplained.feature), unexplained.read.call
    asked = [read for read in history.reads if read.asked >> feature & 1]
    return [
        (
            read.call,
            f"read      {_interval(read.call, read.answer, zero)}  {read.seen[feature]!r}"
            + f"  at {_clock(read, unexplained.read)}"
            + ("  <- this" if (read.call, read.answer) == unexplained.read[:2] else ""),
        )
        for read in sorted(asked, key=lambda read: abs(read.call - zero))[:CONTEXT_READS]
    ]


def _describe(history: History, write: Write, read: Read) -> str:
    if write.erases:
        return "erase"
    events = [event for index, event in enumerate(history.events) if write.events >> index & 1]
    zero_ms = read.moments[0].first_ms
    text = ", ".join(
        f"{event.action or 'served'} {event.dwell_ms or ''}".strip() + f" leaves {event.leaves_ms - zero_ms:+,d}"
        for event in events
    )
    return f"{text}{'' if write.new is None else ' (new)' if write.new else ' (known)'}"


def _interval(start: int, end: int | None, zero: int) -> str:
    shown = "?" if end is None else f"{(end - zero) / 1e6:.1f}"
    return f"[{(start - zero) / 1e6:.1f} … {shown}]"


def _clock(read: Read, of: Read) -> str:
    """What the clock may have shown, in ms since the first moment of the read `of`."""
    zero_ms = of.moments[0].first_ms
    return ", ".join(f"{first_ms - zero_ms:+,d} … {last_ms - zero_ms:+,d}" for first_ms, last_ms in read.moments)


def _indices(mask: int) -> str:
    return "{" + ", ".join(str(index) for index in range(mask.bit_length()) if mask >> index & 1) + "}"
