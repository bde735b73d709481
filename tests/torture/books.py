"""What is written down of each user while the run goes on, and the judgement when the user's time is over."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import NamedTuple

from tests.torture.checker import Culprit, History, Verdict, Write, check
from tests.torture.facts import FEATURES, Fact

MAX_WRITES = 40
MAX_READS = 6_000
CONTEXT_READS = 12
CONTEXT_WRITES = 30


class Span(NamedTuple):
    """Something that happened for a while, for whoever reads of a violation."""

    start: int
    end: int
    name: str


@dataclass(slots=True)
class Book:
    """One user. `erasable` users are erased now and then, and never written by the queue, whose jobs may come twice."""

    user_id: str
    erasable: bool
    history: History = field(default_factory=History)
    opened: int = field(default_factory=monotonic_ns)
    under_way: int = 0
    lost: list[int] = field(default_factory=list)
    by_queue: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether it is time for another user."""
        history = self.history
        return len(history.writes) >= MAX_WRITES or len(history.reads) >= MAX_READS

    def place(self, fact: Fact) -> int:
        """The bit of a fact."""
        known = self.places.get(fact.event_id)
        if known is None:
            known = self.places[fact.event_id] = len(self.history.facts)
            self.history.facts.append(fact)
        return 1 << known


@dataclass(slots=True)
class Ledger:
    """Of the whole run."""

    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    spans: list[Span] = field(default_factory=list)
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
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_at_first: bool = False

    def violated(self, text: str) -> None:
        """A promise is broken."""
        self.violations.append(text)
        if self.stop_at_first:
            self.stop.set()

    def judge(self, book: Book) -> None:
        """Check a user whose time is over."""
        verdict = check(book.history)
        self.users += 1
        self.answers += len(book.history.reads)
        self.observations += verdict.observations
        self.states += verdict.states
        if verdict.explained is None:
            self.undecided += 1
        elif not verdict.explained:
            self.violated(explain(book, verdict, self.spans))


def explain(book: Book, verdict: Verdict, spans: list[Span]) -> str:
    """What somebody needs who wants to know how it came to that."""
    history, culprit = book.history, verdict.culprit
    if culprit is None:
        return f"{book.user_id}: no order of its writes is possible\n  " + "\n  ".join(map(repr, history.writes))
    zero = culprit.read.call
    lines = [
        f"{book.user_id}: {culprit.feature} was answered as {culprit.value!r}, and no order explains it.",
        f"Acknowledged before the read began: {_named(culprit.required)}; begun before it was answered: "
        f"{_named(culprit.allowed)}; applied in the best attempt: {_named(culprit.applied)}, "
        f"which makes {culprit.expected!r}.",
        "Times in ms from the read's call.",
    ]
    rows = [*_writes_about(history, zero), *_reads_about(history, culprit)]
    rows += [
        (span.start, f"fault     {_span(span.start, span.end, zero)}  {span.name}")
        for span in spans
        if span.end > zero - 3_000_000_000 and span.start < zero + 1_000_000_000
    ]
    return "\n  ".join([*lines, *(text for _, text in sorted(rows))])


def _writes_about(history: History, zero: int) -> list[tuple[int, str]]:
    rows = [
        (write.start, f"write {number:2d}  {_span(write.start, write.end, zero)}  {_told(history, write)}")
        for number, write in enumerate(history.writes)
    ]
    return sorted(rows, key=lambda row: abs(row[0] - zero))[:CONTEXT_WRITES]


def _reads_about(history: History, culprit: Culprit) -> list[tuple[int, str]]:
    feature, zero = FEATURES.index(culprit.feature), culprit.read.call
    asked = [read for read in history.reads if read.asked >> feature & 1]
    return [
        (
            read.call,
            f"read      {_span(read.call, read.answer, zero)}  {read.seen[feature]!r}"
            + ("  <- this" if (read.call, read.answer) == culprit.read[:2] else ""),
        )
        for read in sorted(asked, key=lambda read: abs(read.call - zero))[:CONTEXT_READS]
    ]


def _told(history: History, write: Write) -> str:
    if write.erases:
        return "erase"
    facts = [fact for place, fact in enumerate(history.facts) if write.facts >> place & 1]
    what = ", ".join(f"{fact.action or 'served'} {fact.dwell_ms or ''}".strip() for fact in facts)
    return f"{what}{'' if write.new is None else ' (new)' if write.new else ' (known)'}"


def _span(start: int, end: int | None, zero: int) -> str:
    shown = "?" if end is None else f"{(end - zero) / 1e6:.1f}"
    return f"[{(start - zero) / 1e6:.1f} … {shown}]"


def _named(mask: int) -> str:
    return "{" + ", ".join(str(place) for place in range(mask.bit_length()) if mask >> place & 1) + "}"
