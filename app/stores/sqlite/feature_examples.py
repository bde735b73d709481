"""Runs the examples of features: stores their events in an empty database, and computes values as a live read does."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec

from app.errors import ProfilesError
from app.events.validation import admit
from app.features.examples import events_of
from app.features.registry import Feature, Registry, as_dtype, indices
from app.profiles.ports import ComputeRow
from app.stores.migrate import migrate
from app.stores.sqlite.database import SqliteDatabase
from app.stores.sqlite.event_log import SqliteEventLog
from app.stores.sqlite.features import SqliteSource, check_features

NOW_MS = 1_777_118_400_000  # 2026-04-25T12:00:00Z: the results do not depend on the day of the run
KEPT_DAYS = 36_500


class ExamplesRun(NamedTuple):
    """The result of running the examples of a feature: their number, and a message for each failure."""

    feature: str
    examples: int
    failures: list[str]


async def run_examples(registry: Registry, mask: int, timeout_s: float) -> list[ExamplesRun]:
    """Run the examples of the features in the bit mask `mask`. Each statement may take `timeout_s` seconds. Raises
    `RegistryError` if an entry's SQL does not compile against the schema."""
    with TemporaryDirectory(prefix="profiles-examples-") as directory:
        path = Path(directory) / "examples.db"
        migrate(path)
        database = await SqliteDatabase.open(path, 1)
        try:
            await database.read(lambda connection: check_features(registry, connection))
            source = SqliteSource(database, registry, timeout_s=timeout_s)
            return [await _run(database, source, registry, index) for index in indices(mask)]
        finally:
            await database.close()


async def _run(database: SqliteDatabase, source: SqliteSource, registry: Registry, index: int) -> ExamplesRun:
    entry = registry[index]
    failures = []
    for number, example in enumerate(entry.examples, start=1):
        user_id = f"{entry.name}-{number}"
        try:
            admitted = admit(events_of(example, NOW_MS, user_id), NOW_MS, KEPT_DAYS)
        except (msgspec.ValidationError, ProfilesError) as error:
            failures.append(f"example {number}: an event is not allowed: {error}")
            continue
        await SqliteEventLog(database).append([admitted])
        snapshot = await source.compute(NOW_MS, [ComputeRow(user_id, 1 << index)])
        problem = _problem(entry, example.value, snapshot.rows[0][index], snapshot.errors.get((0, index)))
        if problem is not None:
            failures.append(f"example {number}: {problem}")
    return ExamplesRun(entry.name, len(entry.examples), failures)


def _problem(entry: Feature, expected: object, raw: object, error: str | None) -> str | None:
    value, wrong = entry.value_of(raw)
    if error is not None or wrong is not None:
        return error or wrong
    wanted = entry.default if expected is None else as_dtype(entry.dtype, expected)
    if expected is not None and wanted is None:
        return f"the expected value {expected!r} is not of dtype {entry.dtype}"
    return None if value == wanted else f"expected {wanted!r}, computed {value!r}"
