"""Findings, worst first: states and figures that need attention, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from app.operations.figures import Figure
from app.operations.samples import Sample
from app.operations.states import SEVERITY, ComponentStatus, State

SLOW_MS = 250
LATE_MS = 1_000
OLD_S = 60


class Finding(msgspec.Struct, frozen=True):
    """Something that is not well, what to do, and where. `subject` names a component, a figure or a count."""

    state: State
    subject: str
    text: str
    advice: str
    path: str | None = None


ADVICE: Mapping[str, str] = {
    "database": "Look at the disk (full? gone?), and for a process that holds a lock on the file.",
    "cache": "Bring it back; the service notices. If one process alone cannot reach it, look at that process.",
    "queue": "Bring it back; events are stored all the same, and the sweep catches up.",
    "worker": "Start one (profiles worker). Until then events wait, unconsumed; reads are not affected.",
    "features": "Mend its definition, or disable it. It is tried again by itself; the other features are served.",
}

UNREADABLE = (
    "Such a user is scored as a new one and teaches nothing; other users are not affected. The workers' logs tell of "
    "each (statistics_set_aside). Put the rows back from a backup, or erase the users. Look at the disk, too."
)


def findings(
    standings: Sequence[ComponentStatus], figures: Mapping[str, Figure], counted: Mapping[str, int]
) -> list[Finding]:
    """What should be looked at. `counted` is of the last hour."""
    found = [
        Finding(item.state, item.component, f"{_subject(item.component)} {item.state}: {item.detail}.", advice)
        for item in standings
        if item.state in ("degraded", "down") and (advice := ADVICE.get(item.component))
    ]
    found += [Finding("degraded", *item) for item in (*_of_figures(figures), *_of_work(figures), *_of_counts(counted))]
    return sorted(found, key=lambda item: -SEVERITY[item.state])


def mixed_registries(newest: Iterable[Sample]) -> list[Finding]:
    """Whether running processes serve different registries, by the newest sample of each.

    Older releases do not say which registry they serve.
    """
    served: dict[str, list[str]] = {}
    for sample in newest:
        if sample.registry and not sample.stopped:
            served.setdefault(sample.registry, []).append(sample.told)
    if len(served) < 2:
        return []
    each = "; ".join(f"{registry} by {', '.join(sorted(names))}" for registry, names in sorted(served.items()))
    advice = "That is expected during a release. Otherwise start the others anew with the same PROFILES_FEATURES."
    return [Finding("degraded", "registry", f"Running processes serve different registries: {each}.", advice)]


def wrong_decisions(senders: Sequence[tuple[str, int]]) -> list[Finding]:
    """Who sent events within the last day that name no decision of their user, and how many."""
    advice = "Nothing is learned from them. Have it send the decision_id that /score answered for the same user."
    texts = [f"{_plural(count, 'event')} sent by {sender} named no decision of the user." for sender, count in senders]
    return [Finding("degraded", "decision_ids", text, advice) for text in texts]


def waiting_to_be_pruned(what: Sequence[str]) -> list[Finding]:
    """Whether the first run that deletes the given kinds of things waits for an admin."""
    if not what:
        return []
    text = f"Old {' and '.join(what)} are not deleted: the first run would delete more than three days of them."
    advice = "Look at this machine's clock and at the settings of retention; then run `profiles prune --confirm`."
    return [Finding("degraded", "retention", text, advice)]


def _subject(component: str) -> str:
    return f"The {component} {'are' if component == 'features' else 'is'}"


def _of_figures(figures: Mapping[str, Figure]) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []

    def now(name: str) -> float:
        return figures[name].now or 0

    if count := int(now("failed_requests")):
        text = f"{_plural(count, 'request')} failed (5xx) in the last minute."
        found.append(("failed_requests", text, "The log names each, with its route and the cause."))
    if count := int(now("shed")):
        verb = "was" if count == 1 else "were"
        text = f"{_plural(count, 'request')} of the last minute {verb} sent away: too much load."
        advice = "What was let in is answered in time. If it goes on, add a process, or a limit for each key."
        found.append(("shed", text, advice))
    if (took := now("latency_p99_ms")) > SLOW_MS:
        text = f"One answer in a hundred takes over {took:,.0f} ms."
        found.append(("latency_p99_ms", text, "Degraded reads or a low hit ratio explain it; otherwise add a process."))
    if count := int(now("degraded_reads")):
        text = f"{_plural(count, 'profile')} of the last minute came from the database, past the cache."
        found.append(("degraded_reads", text, "Right, but slower. It ends when the cache answers and nothing is owed."))
    if (took := now("lag_p99_ms")) > LATE_MS:
        text = f"One event in a hundred waits over {took:,.0f} ms until its keys are deleted."
        found.append(("lag_p99_ms", text, "Its producer waits with it. Look at the disk and at the cache."))
    return found


def _of_work(figures: Mapping[str, Figure]) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []

    def now(name: str) -> float:
        return figures[name].now or 0

    if (age := now("outbox_age_s")) > OLD_S:
        text = f"The oldest event has waited {age:,.0f} s to be consumed."
        found.append(("outbox_age_s", text, "Reads are not affected. Start a worker, or one more."))
    if count := int(now("dead_letters")):
        verb = "waits" if count == 1 else "wait"
        found.append(("dead_letters", f"{_plural(count, 'dead letter')} {verb}.", "Replay or discard each."))
    if count := int(now("unreadable")):
        text = f"The learned evidence of {_plural(count, 'user')} is damaged, and was set aside."
        found.append(("unreadable", text, UNREADABLE))
    if count := int(now("events_ahead")):
        verb = "lies" if count == 1 else "lie"
        text = f"{_plural(count, 'event')} {verb} more than five minutes in the future."
        found.append(("events_ahead", text, "A clock was wrong when they came. They count as recent until that time."))
    return found


def _of_counts(counted: Mapping[str, int]) -> list[tuple[str, str, str]]:
    found = []
    if count := counted.get("feature_errors", 0):
        text = f"{_plural(count, 'value')} of a feature could not be computed within the last hour."
        found.append(("feature_errors", text, "A feature's definition is broken; the log and /metrics name it."))
    if count := counted.get("stale_dropped", 0):
        text = f"{_plural(count, 'value')} older than an event stood in the cache within the last hour."
        found.append(("stale_dropped", text, "They were dropped, but should not have been there: please report it."))
    if count := counted.get("untrue", 0):
        text = f"The audit found {_plural(count, 'cached value')} untrue within the last hour."
        advice = "They were dropped. The workers' logs tell of each (consistency_violation): please report it."
        found.append(("untrue", text, advice))
    return found


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
