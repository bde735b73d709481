"""Does the language model keep failing? What the samples of all processes say of the tips that a model should word.

Templates stand in for it, so nothing else tells of it: no request fails, and readiness is not touched. It keeps failing
where most tips of a minute fell back to the template, and so on up to now; minutes without requests say nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from app.features.clock import rfc3339
from app.operations.findings import Finding
from app.operations.samples import Sample

PREFIX = "generations_"
# `template`: no model is set. `stopping` says something of a process that ends.
NOT_OF_A_MODEL = frozenset({"template", "stopping"})
WELL = "model"
# As many in a row as open the circuit.
FEWEST = 3
MINUTE_MS = 60_000
LATELY_MS = 15 * MINUTE_MS
# What another reason is behind.
FOLLOWS = "circuit open"
ADVICE = (
    "Tips are worded by the template meanwhile; nothing fails. The README's table of fallback reasons says what each "
    "means, and the log has the details (model_failed). Look at PROFILES_MODEL_URL, its key and its limits."
)


def failing_model(samples: Iterable[Sample], now_ms: int) -> list[Finding]:
    """A finding that says since when and why, where it keeps failing. Samples come in the order of time."""
    began_ms: int | None = None
    newest_ms = 0
    reasons: Counter[str] = Counter()
    for at_ms, outcomes in _by_minute(samples):
        well = outcomes.pop(WELL, 0)
        if outcomes.total() > well:
            began_ms, newest_ms = began_ms or at_ms, at_ms
            reasons += outcomes
        else:
            began_ms, reasons = None, Counter()
    if began_ms is None or reasons.total() < FEWEST or now_ms - newest_ms > LATELY_MS:
        return []
    named = sorted(reasons.items(), key=lambda item: (item[0] == FOLLOWS, -item[1]))
    why = ", ".join(f"{reason} ({count:,})" for reason, count in named)
    text = f"The language model has kept failing since {rfc3339(began_ms)[11:16]} UTC: {why}."
    return [Finding("degraded", "model", text, ADVICE)]


def _by_minute(samples: Iterable[Sample]) -> list[tuple[int, Counter[str]]]:
    """What came of the tips that a model should word, for each minute that had any, and when the first of it was."""
    found: dict[int, tuple[int, Counter[str]]] = {}
    for sample in samples:
        outcomes = {
            name.removeprefix(PREFIX): count for name, count in sample.counts.items() if name.startswith(PREFIX)
        }
        told = {name: count for name, count in outcomes.items() if name not in NOT_OF_A_MODEL}
        if told:
            start_ms = sample.at_ms - round(sample.seconds * 1000)
            found.setdefault(sample.at_ms // MINUTE_MS, (start_ms, Counter()))[1].update(told)
    return [found[minute] for minute in sorted(found)]
