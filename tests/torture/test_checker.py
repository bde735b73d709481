"""The checker against an oracle that tries every permutation, and against histories with an obvious verdict."""

import itertools
from collections.abc import Iterator, Sequence
from random import Random
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.features.events import TipEvent
from tests.support.clock import NOW_MS
from tests.support.events import admitted, feedback, served
from tests.support.reference import profile
from tests.torture.checker import SKEW_MS, History, Moments, Read, Write, check
from tests.torture.model import FEATURES, MAX_STEP_MS, WINDOW_MS, Event, draw, values

ALL = (1 << len(FEATURES)) - 1
VOLUME = 1 << FEATURES.index("tip_volume_30d")


def view(name: str = "one", at_ms: int = NOW_MS) -> Event:
    return Event(name, None, None, at_ms, 0)


NOW = (Moments(NOW_MS, NOW_MS),)


def volume(call: int, answer: int, count: int, *moments: tuple[int, int]) -> Read:
    """A read at the given moments, in ms since `NOW_MS`."""
    shown = [Moments(NOW_MS + first, NOW_MS + last) for first, last in moments]
    return Read(call, answer, VOLUME, (None, None, None, None, count), shown or NOW)


def explains(history: History, order: Sequence[Write]) -> bool:
    """The rule of the checker, implemented literally for one order."""
    prefixes = [frozenset[Write]()]
    alive: set[int] = set()
    states: list[set[int]] = [set()]
    for place, write in enumerate(order):
        if any(later.end is not None and later.end < write.start for later in order[place + 1 :]):
            return False
        own = {index for index in range(len(history.events)) if write.events >> index & 1}
        if (write.new is True and own & alive) or (write.new is False and own - alive):
            return False
        alive = set() if write.erases else alive | own
        prefixes.append(prefixes[-1] | {write})
        states.append(alive)
    for read in history.reads:
        for feature in range(len(FEATURES)):
            if read.asked >> feature & 1 and not any(
                all(write in prefix for write in order if write.end is not None and write.end < read.call)
                and all(write.start <= read.answer for write in prefix)
                and values(event for index in state if (event := history.events[index]).at_ms > at_ms - WINDOW_MS)[
                    feature
                ]
                == read.seen[feature]
                for prefix, state in zip(prefixes, states, strict=True)
                for first_ms, last_ms in read.moments
                for at_ms in range(first_ms, last_ms + SKEW_MS + 1, TICK_MS)
            ):
                return False
    return True


def oracle(history: History) -> bool:
    """For each subject: every subset of the unknown writes, in every order."""
    views = sum(1 << place for place, event in enumerate(history.events) if event.action is None)
    for events, features in ((views, VOLUME), (15 & ~views, ALL & ~VOLUME)):
        writes = [write._replace(events=write.events & events) for write in history.writes]
        part = History(
            history.events,
            [write for write in writes if write.events or write.erases],
            [read._replace(asked=read.asked & features) for read in history.reads],
        )
        if not ordered(part):
            return False
    return True


def ordered(history: History) -> bool:
    known = [write for write in history.writes if write.end is not None]
    unknown = [write for write in history.writes if write.end is None]
    for count in range(len(unknown) + 1):
        for happened in itertools.combinations(unknown, count):
            for order in itertools.permutations([*known, *happened]):
                if explains(history, order):
                    return True
    return False


TICK_MS = 500  # of the oracle's clock
EVENTS = [
    view("a"),
    view("b", NOW_MS + 5 * TICK_MS - WINDOW_MS),
    Event("c", "completed", 7, NOW_MS + 7 * TICK_MS - WINDOW_MS, 0),
    Event("d", "dismissed", 11, NOW_MS + 5 * TICK_MS - WINDOW_MS, 0),
]
moments = st.integers(0, 12)


@st.composite
def histories(draw_from: st.DrawFn) -> History:
    """Small histories. Many are nearly right, because reads take their values from some set of the events."""
    writes = []
    for number in range(draw_from(st.integers(0, 4))):
        start = draw_from(moments) * 10 + number  # unique, so that no two writes are equal
        length = draw_from(st.none() | st.integers(1, 61))
        end = None if length is None else start + length
        erases = draw_from(st.integers(0, 4)) == 0
        events = 0 if erases else draw_from(st.sampled_from([1, 1, 2, 3, 4, 8, 12]))
        new = None if erases or end is None else draw_from(st.sampled_from([None, None, None, True, False]))
        writes.append(Write(start, end, events, erases, new))
    reads = []
    for _ in range(draw_from(st.integers(0, 4))):
        call = draw_from(moments) * 10 + 5
        answer = call + draw_from(st.integers(0, 40))
        if draw_from(st.booleans()):  # the values after all writes that had begun
            mask = 0
            for write in writes:
                mask |= write.events if write.start <= answer else 0
        else:
            mask = draw_from(st.integers(0, 15))
        ticks = draw_from(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=2))
        shown = [Moments(NOW_MS + first * TICK_MS, NOW_MS + (first + more) * TICK_MS) for first, more in ticks]
        at_ms = shown[0].last_ms + draw_from(st.sampled_from([0, 0, SKEW_MS, SKEW_MS + TICK_MS]))
        seen = values(event for index, event in enumerate(EVENTS) if mask >> index & 1 and event.leaves_ms > at_ms)
        reads.append(Read(call, answer, draw_from(st.integers(0, ALL)), seen, shown))
    return History(list(EVENTS), writes, reads)


@settings(max_examples=500, deadline=None)
@given(histories())
def test_checker_agrees_with_the_oracle_when_histories_are_small(history: History) -> None:
    assert check(history).explained is oracle(history)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 10_000), max_size=12),
    st.integers(),
    st.integers(0, 2_000) | st.integers(-MAX_STEP_MS, MAX_STEP_MS),
)
def test_values_equal_the_reference_when_events_are_drawn(numbers: list[int], seed: int, later_ms: int) -> None:
    random = Random(seed)
    events = [draw(random, f"event-{place}", number, NOW_MS) for place, number in enumerate(numbers)]
    stored = [admitted(_event(event)) for event in events]
    expected = profile(stored, "ann", NOW_MS + later_ms)
    in_window = [event for event in events if event.leaves_ms > NOW_MS + later_ms]
    assert dict(zip(FEATURES, values(in_window), strict=True)) == expected


def _event(event: Event) -> TipEvent:
    if event.action is None:
        return served("ann", event.at_ms, offset_min=event.offset_min, event_id=event.event_id)
    return feedback(
        "ann", event.at_ms, event.action, dwell_ms=event.dwell_ms, offset_min=event.offset_min, event_id=event.event_id
    )


@pytest.mark.parametrize(
    ("reads", "explained"),
    [
        ([volume(0, 5, 0), volume(25, 30, 1)], True),
        ([volume(12, 13, 1), volume(14, 15, 0)], True),  # while the write is in progress, each read may see it or not
        ([volume(21, 25, 0)], False),  # older than the acknowledged write
        ([volume(0, 9, 1)], False),  # newer than the writes that had begun
        ([volume(21, 25, 2)], False),  # counted twice
    ],
)
def test_verdict_when_there_is_one_event(reads: list[Read], explained: bool) -> None:
    assert check(History([view()], [Write(10, 20, 1)], reads)).explained is explained


def test_unknown_write_may_show_at_any_time_when_not_sent_again() -> None:
    lost = Write(10, None, 1)
    for reads in ([volume(100, 101, 0)], [volume(100, 101, 1)], [volume(50, 51, 0), volume(100, 101, 1)]):
        assert check(History([view()], [lost], reads)).explained


def test_unknown_write_is_settled_when_sent_again() -> None:
    writes = [Write(10, None, 1), Write(20, 30, 1, new=False)]
    assert check(History([view()], writes, [volume(15, 16, 1)])).explained
    assert not check(History([view()], writes, [volume(31, 32, 0)])).explained
    assert not check(History([view()], [Write(20, 30, 1, new=False)], [])).explained, "known, although never sent"


def test_erased_event_is_a_violation_when_a_read_shows_it() -> None:
    writes = [Write(10, 20, 1, new=True), Write(30, 40, 0, erases=True)]
    assert check(History([view()], writes, [volume(35, 36, 1)])).explained
    assert not check(History([view()], writes, [volume(41, 42, 1)])).explained
    again = [*writes, Write(50, 60, 1, new=True)]
    assert check(History([view()], again, [volume(45, 46, 0), volume(61, 62, 1)])).explained


def test_features_may_differ_in_time_when_two_writes_are_in_progress() -> None:
    events = [view(), Event("done", "completed", 7, NOW_MS, 0)]
    writes = [Write(10, 100, 1), Write(11, 100, 2)]
    only_view = Read(20, 21, ALL, values(events[:1]), NOW)
    only_done = Read(30, 31, ALL, values(events[1:]), NOW)
    assert check(History(events, writes, [only_view])).explained
    assert check(History(events, writes, [only_done])).explained
    # Each cell is filled separately, so the second answer is valid although it is no prefix as a whole.
    assert check(History(events, writes, [only_view, only_done])).explained


def test_verdict_names_the_answer_when_nothing_explains_it() -> None:
    verdict = check(History([view()], [Write(10, 20, 1)], [volume(1, 2, 0), volume(21, 25, 0), volume(26, 27, 1)]))
    assert verdict.explained is False
    assert verdict.unexplained is not None
    found = verdict.unexplained
    assert (found.feature, found.value, found.expected) == ("tip_volume_30d", 0, [1])


@pytest.mark.parametrize(
    ("count", "moments", "explained"),
    [
        (1, [(4_000, 4_999)], True),
        (1, [(4_000, 5_001)], True),  # it may have been read before the event left
        (1, [(5_000, 5_001)], False),  # the event has left
        (0, [(5_000, 5_001)], True),
        (0, [(3_999, 4_000)], True),  # as the clock of the process shows that filled the cache
        (0, [(3_998, 3_999)], False),  # no clock is so far ahead
        (1, [(9_000, 9_001), (-9_000, -8_999)], True),  # the clock was set back during the read
        (0, [(9_000, 9_001), (-9_000, -8_999)], True),
    ],
)
def test_verdict_when_an_event_leaves_the_window(count: int, moments: list[tuple[int, int]], explained: bool) -> None:
    leaving = view("leaving", NOW_MS + 5_000 - WINDOW_MS)
    assert check(History([leaving], [Write(10, 20, 1)], [volume(21, 25, count, *moments)])).explained is explained


def test_events_leave_together_when_their_times_are_equal() -> None:
    pair = [view(name, NOW_MS + 5_000 - WINDOW_MS) for name in ("a", "b")]
    for count, explained in ((2, True), (1, False), (0, True)):
        history = History(pair, [Write(10, 20, 3)], [volume(21, 25, count, (4_000, 6_000))])
        assert check(history).explained is explained


def test_event_returns_when_the_clock_is_set_back() -> None:
    leaving = view("leaving", NOW_MS + 5_000 - WINDOW_MS)
    reads = [volume(21, 25, 1, (0, 1)), volume(31, 35, 0, (6_000, 6_001)), volume(41, 45, 1, (3_000, 3_001))]
    assert check(History([leaving], [Write(10, 20, 1)], reads)).explained


def busy(random: Random, writes: int, reads: int) -> History:
    """A long valid history: writes overlap a little, some outcomes are unknown, each read shows a true state. Events
    leave the window meanwhile."""
    history = History()
    commits: list[int] = []
    now = 0
    for number in range(writes):
        now += random.randrange(1, 100)
        start, commit, end = now, now + random.randrange(1, 60), now + 60 + random.randrange(1, 100)
        commit = max(commit, commits[-1] + 1 if commits else 0)
        history.events.append(draw(random, f"event-{number}", number, NOW_MS))
        commits.append(commit)
        history.writes.append(
            Write(start, None if random.random() < 0.05 else max(end, commit + 1), 1 << number, new=None)
        )
    for call in sorted(random.randrange(now + 300) for _ in range(reads)):
        at = call + random.randrange(20)
        stored = history.events[: sum(commit <= at for commit in commits)]
        shown = Moments(NOW_MS + call, NOW_MS + at)
        seen = values(event for event in stored if event.leaves_ms > shown.first_ms)
        history.reads.append(Read(call, at + random.randrange(20), ALL, seen, [shown]))
    return history


def _histories(count: int, writes: int, reads: int) -> Iterator[History]:
    for seed in range(count):
        yield busy(Random(seed), writes, reads)


def test_checker_is_fast_when_histories_are_long() -> None:
    long = list(_histories(20, writes=60, reads=5_000))
    started = process_time()
    assert all(check(history).explained for history in long)
    assert process_time() - started < 10, "100,000 operations; one or two seconds are usual"


def test_one_stale_answer_among_thousands_is_found() -> None:
    for seed, history in enumerate(_histories(10, writes=40, reads=2_000)):
        random = Random(seed)
        late = [read for read in history.reads if read.call > history.writes[20].start + 300]
        chosen = random.choice(late)
        stale = values(event for event in history.events[:5] if event.leaves_ms > chosen.moments[0].first_ms)
        assert stale != chosen.seen
        history.reads[history.reads.index(chosen)] = chosen._replace(seen=stale)
        assert check(history).explained is False
