"""Derives findings from component states and figures. A finding is a problem for an admin, with advice."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from app.features.clock import rfc3339
from app.operations.component_states import SEVERITY, ComponentStatus, State
from app.operations.figures import Figure
from app.operations.samples import Sample, sum_samples

RECENT_MS = 15 * 60_000
GENERATIONS = "generations_"
# Outcomes of tips for which the model was not called: no model is set, or the process was about to end.
NO_MODEL_ASKED = frozenset({"template", "stopping"})
BY_MODEL = "model"
MIN_FAILURES = 3  # fewer may be chance
# The outcome of requests made while the model is skipped, which is not the cause of the problem.
CONSEQUENCE = "circuit open"


class Finding(msgspec.Struct):
    """A problem that needs attention. `subject` names a component or a figure; `path` is the page that shows it."""

    state: State
    subject: str
    text: str
    advice: str
    path: str | None = None


class Rule(NamedTuple):
    """A figure or count above `limit` is a finding with the text `text(value)`."""

    text: Callable[[float], str]
    advice: str
    limit: float = 0


def _counted(count: float, one: str, many: str) -> str:
    return f"{count:,.0f} {one if count == 1 else many}"


COMPONENT_ADVICE: Mapping[str, str] = {
    "database": "Check the disk (full? missing?), and whether a process holds a lock on the file.",
    "cache": "Check that it runs and accepts writes; the service reconnects. If one process fails alone, check it.",
    "queue": "Check that it runs; the service reconnects. Events are stored meanwhile, and consumed afterwards.",
    "worker": "Start one (profiles worker). Until then events wait to be consumed; reads are not affected.",
    "features": "Correct the definition, or disable the feature. It is retried; the other features are served.",
}
# Rules by the name of a figure, applied to its value for the last minute; or by that of a count that is no figure,
# applied to its sum over the last hour.
RULES = {
    "failed_requests": Rule(
        lambda count: f"{_counted(count, 'request', 'requests')} failed (5xx) in the last minute.",
        "The log names the route and the cause of each.",
    ),
    "shed": Rule(
        lambda count: f"{_counted(count, 'request was', 'requests were')} shed in the last minute: overload.",
        "Admitted requests are answered in time. If it lasts, add a process, or limit the rate of each key.",
    ),
    "latency_p99_ms": Rule(
        lambda ms: f"One answer in a hundred takes over {ms:,.0f} ms.",
        "Degraded reads and a low hit ratio make answers slow. If there are none, add a process.",
        limit=250,
    ),
    "degraded_reads": Rule(
        lambda count: f"{_counted(count, 'read was', 'reads were')} computed without the cache in the last minute.",
        "They are correct, but slower. It ends when the cache answers and no invalidation is owed.",
    ),
    "lag_p99_ms": Rule(
        lambda ms: f"One event in a hundred waits over {ms:,.0f} ms until its keys are deleted.",
        "Its producer waits as long. Check the disk and the cache.",
        limit=1_000,
    ),
    "outbox_age_s": Rule(
        lambda seconds: f"The oldest event has waited {seconds:,.0f} s to be consumed.",
        "Reads are not affected. Start a worker, or one more.",
        limit=60,
    ),
    "dead_letters": Rule(
        lambda count: f"{_counted(count, 'dead letter waits', 'dead letters wait')} for an admin.",
        "Replay or discard each.",
    ),
    "unreadable": Rule(
        lambda count: f"The learned state of {_counted(count, 'user', 'users')} is damaged and was set aside.",
        "Such a user is scored as a new user and not learned from; other users are not affected. The workers' logs "
        "name each (statistics_set_aside). Restore the rows from a backup, or erase the users. Check the disk.",
    ),
    "events_ahead": Rule(
        lambda count: f"{_counted(count, 'event lies', 'events lie')} more than five minutes in the future.",
        "A clock was wrong when they were stored. They count as recent until that time has come.",
    ),
    "untrue": Rule(
        lambda count: f"The audit found {_counted(count, 'wrong value', 'wrong values')} in the cache within the hour.",
        "They were dropped. The workers' logs describe each (consistency_violation): please report this.",
    ),
    "decision_checks_violation": Rule(
        lambda count: f"The audit found {_counted(count, 'decision', 'decisions')} with a wrong profile in the hour.",
        "A training set with it is wrong. The workers' logs describe each (decision_violation): please report this.",
    ),
    "feature_errors": Rule(
        lambda count: f"{_counted(count, 'feature value', 'feature values')} could not be computed in the last hour.",
        "The definition of a feature is broken; the log and /metrics name it.",
    ),
    "stale_dropped": Rule(
        lambda count: f"The cache held {_counted(count, 'value', 'values')} older than an event within the last hour.",
        "They were dropped and not served. After an outage of the cache this is expected; otherwise please report it.",
    ),
}
AUDIT_COUNTS = ("untrue", "decision_checks_violation")  # of the workers' audit


def findings(
    statuses: Sequence[ComponentStatus], figures: Mapping[str, Figure], counts: Mapping[str, int]
) -> list[Finding]:
    """Derive the findings from component states, figures, and the sums of counts over the last hour; worst first."""
    found = []
    for name, state, detail, *_ in statuses:
        if state in ("degraded", "down") and name in COMPONENT_ADVICE:
            text = f"The {name} {'are' if name == 'features' else 'is'} {state}: {detail}."
            found.append(Finding(state, name, text, COMPONENT_ADVICE[name]))
    for name, rule in RULES.items():
        value = figures[name].now if name in figures else counts.get(name)
        if value is not None and value > rule.limit:
            found.append(Finding("degraded", name, rule.text(value), rule.advice))
    return sorted(found, key=lambda item: -SEVERITY[item.state])


def mixed_registries(newest: Iterable[Sample]) -> list[Finding]:
    """A finding if the `newest` samples of the processes name different registries. Older releases name none."""
    served: defaultdict[str, list[str]] = defaultdict(list)
    for sample in newest:
        if sample.registry and not sample.stopped:
            served[sample.registry].append(sample.process_label)
    if len(served) < 2:
        return []
    each = "; ".join(f"{registry} by {', '.join(sorted(names))}" for registry, names in sorted(served.items()))
    advice = "This is expected during a release. Otherwise restart the processes with the same PROFILES_FEATURES."
    return [Finding("degraded", "registry", f"Running processes serve different registries: {each}.", advice)]


def wrong_decisions(senders: Sequence[tuple[str, int]]) -> list[Finding]:
    """A finding for each producer with events that named an unknown decision. `senders`: producers and counts."""
    advice = "Nothing is learned from them. The sender must use the decision_id that /score returned for the same user."
    counted = [(_counted(count, "event", "events"), sender) for sender, count in senders]
    texts = [f"{events} sent by {sender} named no decision of the user." for events, sender in counted]
    return [Finding("degraded", "decision_ids", text, advice) for text in texts]


def waiting_to_be_pruned(kinds: Sequence[str]) -> list[Finding]:
    """A finding if the first deletion of `kinds` of rows, such as `events`, waits for an admin's confirmation."""
    if not kinds:
        return []
    text = f"Old {' and '.join(kinds)} are not deleted: the first run would delete more than three days of them."
    advice = "Check this machine's clock and the retention settings; then run `profiles prune --confirm`."
    return [Finding("degraded", "retention", text, advice)]


def failing_model(samples: Sequence[Sample], now_ms: int) -> list[Finding]:
    """A finding, with the reasons, if the language model failed for more tips than it wrote within `RECENT_MS`."""
    counts = sum_samples(sample for sample in samples if now_ms - sample.at_ms <= RECENT_MS).counts
    outcomes = {name.removeprefix(GENERATIONS): count for name, count in counts.items() if name.startswith(GENERATIONS)}
    written = outcomes.pop(BY_MODEL, 0)
    failures = {outcome: count for outcome, count in outcomes.items() if outcome not in NO_MODEL_ASKED}
    failed = sum(failures.values())
    if failed <= max(written, MIN_FAILURES - 1):
        return []
    ordered = sorted(failures.items(), key=lambda item: (item[0] == CONSEQUENCE, -item[1]))
    why = ", ".join(f"{reason} ({count:,})" for reason, count in ordered)
    text = f"The language model failed for {_counted(failed, 'tip', 'tips')} in the last 15 minutes: {why}."
    last_ms = max((sample.at_ms for sample in samples if sample.counts.get(GENERATIONS + BY_MODEL)), default=None)
    if last_ms is not None:
        text += f" It last wrote one at {rfc3339(last_ms)[11:16]} UTC."
    advice = (
        "A template words the tips instead, and no request fails. app/generation/README.md explains each reason; "
        "the log has the details (model_failed). Check PROFILES_MODEL_URL, its key and its limits."
    )
    return [Finding("degraded", "model", text, advice)]
