"""A new entry to begin with, as `profiles features new` prints it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Literal, cast

from app.features.events import RELATIONS
from app.features.export import mirror_line
from app.features.registry import Dtype, Feature, Registry, Scalar

Relation = Literal["feedback", "views"]
_COUNT = "SELECT user_id, COUNT(*) AS value\nFROM {relation}\nGROUP BY user_id"
_LATEST = """SELECT user_id, {column} AS value
FROM (
    SELECT user_id, {column}, ROW_NUMBER() OVER (
        PARTITION BY user_id ORDER BY occurred_at_ms DESC, {column}
    ) AS place
    FROM {relation}
) AS ranked
WHERE place = 1"""
# Text, description, default, and an example's events with the value that they give.
_Sketch = tuple[str, str, Scalar, str, Scalar]
_SKETCHES: dict[tuple[str, str], _Sketch] = {
    ("feedback", "float"): (
        "SELECT user_id, COUNT(*) FILTER (WHERE action = 'completed') / CAST(COUNT(*) AS DOUBLE PRECISION) AS value\n"
        "FROM feedback\nGROUP BY user_id",
        "Share of the user's tip feedback of the last {window} that is 'completed', 0 to 1.",
        None,
        'feedback("completed"), feedback("dismissed")',
        0.5,
    ),
    ("feedback", "int"): (
        _COUNT,
        "How often the user reacted to a tip in the last {window}.",
        0,
        'feedback("completed"), feedback("dismissed")',
        2,
    ),
    ("feedback", "str"): (
        _LATEST.replace("{column}", "action"),
        "What the user did with a tip last, within {window}.",
        None,
        'feedback("completed", ago=timedelta(minutes=9)), feedback("dismissed", ago=timedelta(minutes=5))',
        "dismissed",
    ),
    ("views", "float"): (
        "SELECT user_id, COUNT(*) / CAST(COUNT(DISTINCT tip_id) AS DOUBLE PRECISION) AS value\n"
        "FROM views\nGROUP BY user_id",
        "How often the user was served each tip, on average, in the last {window}.",
        None,
        'served(tip_id="a"), served(tip_id="a"), served(tip_id="b")',
        1.5,
    ),
    ("views", "int"): (
        _COUNT,
        "How many tips the user was served in the last {window}.",
        0,
        "served(), served()",
        2,
    ),
    ("views", "str"): (
        _LATEST.replace("{column}", "tip_id"),
        "The tip that the user was served last, within {window}.",
        None,
        'served(tip_id="a", ago=timedelta(minutes=9)), served(tip_id="b", ago=timedelta(minutes=5))',
        "b",
    ),
}


def scaffold(name: str, relation: str, dtype: str, window: timedelta, ttl: timedelta) -> str:
    """The entry and its line of the mirror, as a text to paste.

    Raises:
        RegistryError: the name is no identifier, or is none that a constant could be named after.
    """
    compute, description, default, events, value = _SKETCHES[relation, dtype]
    entry = Feature(
        name=name,
        dtype=cast(Dtype, dtype),
        ttl=ttl,
        window=window,
        description=description.format(window=_spoken(window)),
        compute=compute.replace("{relation}", relation),
        default=default,
        invalidated_by=(RELATIONS[relation],),
    )
    Registry([entry])
    lines = [
        "# The entry. Edit it, and add its name to the Registry.",
        f"{name.upper()} = Feature(",
        f"    name={json.dumps(name)},",
        f"    dtype={json.dumps(dtype)},",
        f"    ttl={_code(ttl)},",
        f"    window={_code(window)},",
        f"    description={json.dumps(entry.description, ensure_ascii=False)},",
        *([f"    default={default!r},"] if default is not None else []),
        '    compute="""',
        *(f"        {line}" for line in entry.compute.splitlines()),
        '    """,',
        "    examples=[",
        f"        Example(events=[{events}], value={value!r}),".replace("'", '"'),
        "    ],",
        ")",
        "",
        "# Its line in the mirror, ProfileFeatures, if there is one.",
        mirror_line(entry),
    ]
    return "\n".join(lines) + "\n"


def _code(span: timedelta) -> str:
    for unit in ("days", "hours", "minutes"):
        count, rest = divmod(span, timedelta(**{unit: 1}))
        if count and not rest:
            return f"timedelta({unit}={count})"
    return f"timedelta(seconds={span.total_seconds():g})"


def _spoken(span: timedelta) -> str:
    """`7 days`, `1 hour`."""
    code = _code(span)
    unit, _, count = code.removeprefix("timedelta(").removesuffix(")").partition("=")
    return f"{count} {unit if count != '1' else unit.removesuffix('s')}"
