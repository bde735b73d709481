"""Generates the source of a new feature, which `profiles features new` prints."""

from __future__ import annotations

import json
from datetime import timedelta
from textwrap import indent
from typing import cast

from app.features.clock import spoken
from app.features.events import RELATIONS
from app.features.export import mirror_line
from app.features.registry import Dtype, Feature, Registry, Scalar

_COUNT = "SELECT user_id, COUNT(*) AS value\nFROM {relation}\nGROUP BY user_id"
_LATEST = """SELECT user_id, {column} AS value
FROM (
    SELECT user_id, {column}, ROW_NUMBER() OVER (
        PARTITION BY user_id ORDER BY occurred_at_ms DESC, {column}
    ) AS place
    FROM {relation}
) AS ranked
WHERE place = 1"""
# Lines of at most 88 characters and trailing commas, so that the formatter does not change the text.
_MODULE = '''\
# This file is a registry. To extend another registry, copy the entry and add its name.
from datetime import timedelta

from app.features.examples import Example, {event}
from app.features.registry import Feature, Registry

{constant} = Feature(
    name={name},
    dtype={dtype},
    ttl={ttl},
    window={window},
    description={description},
{default}    compute="""
{compute}
    """,
    examples=[
        Example(
            events=[
{events}
            ],
            value={value},
        ),
    ],
)

REGISTRY = Registry([{constant}])

# Its line in the mirror, if the registry has one (a class ProfileFeatures beside it):
{mirror}
'''


# The arguments of the example's events as Python source, oldest first.
_EVENTS = {"feedback": ('"completed"', '"dismissed"'), "views": ('tip_id="a"', 'tip_id="a"', 'tip_id="b"')}
# By relation and dtype: the SQL and the description of a feature, and its value for the events.
_SKETCHES: dict[tuple[str, str], tuple[str, str, Scalar]] = {
    ("feedback", "float"): (
        "SELECT\n    user_id,\n    COUNT(*) FILTER (WHERE action = 'completed')\n"
        "        / CAST(COUNT(*) AS DOUBLE PRECISION) AS value\nFROM feedback\nGROUP BY user_id",
        "Share of the user's tip feedback of the last {window} that is 'completed', 0 to 1.",
        0.5,
    ),
    ("feedback", "int"): (_COUNT, "How often the user reacted to a tip in the last {window}.", 2),
    ("feedback", "str"): (
        _LATEST.replace("{column}", "action"),
        "What the user did with a tip last, within {window}.",
        "dismissed",
    ),
    ("views", "float"): (
        "SELECT user_id, COUNT(*) / CAST(COUNT(DISTINCT tip_id) AS DOUBLE PRECISION) AS value\n"
        "FROM views\nGROUP BY user_id",
        "How often the user was served each tip, on average, in the last {window}.",
        1.5,
    ),
    ("views", "int"): (_COUNT, "How many tips the user was served in the last {window}.", 3),
    ("views", "str"): (
        _LATEST.replace("{column}", "tip_id"),
        "The tip that the user was served last, within {window}.",
        "b",
    ),
}


def scaffold(name: str, relation: str, dtype: str, window: timedelta, ttl: timedelta) -> str:
    """Source of a Python module that declares a registry with one feature, and an example of it.

    `relation` is `views` or `feedback`. A comment at the end has the field for the module's `ProfileFeatures`, if any.

    Raises:
        RegistryError: the name is not an identifier.
    """
    compute, description, value = _SKETCHES[relation, dtype]
    entry = Feature(
        name=name,
        dtype=cast(Dtype, dtype),
        ttl=ttl,
        window=window,
        description=description.format(window=spoken(window)),
        compute=compute.format(relation=relation),
        default=0 if dtype == "int" else None,
        invalidated_by=(RELATIONS[relation],),
    )
    Registry([entry])  # raises if a rule is broken
    event = "served" if relation == "views" else "feedback"
    events = [
        f"                {event}({argument}, ago={_code(window / (number + 2))}),"
        for number, argument in enumerate(_EVENTS[relation])
    ]
    return _MODULE.format(
        event=event,
        constant=f"{name.upper()}_" if name.upper() == "REGISTRY" else name.upper(),
        name=json.dumps(name),
        dtype=json.dumps(dtype),
        ttl=_code(ttl),
        window=_code(window),
        description=json.dumps(entry.description, ensure_ascii=False),
        default="" if entry.default is None else f"    default={json.dumps(entry.default)},\n",
        compute=indent(entry.compute, " " * 8),
        events="\n".join(events),
        value=json.dumps(value),
        mirror=indent(mirror_line(entry), "#"),
    )


def _code(span: timedelta) -> str:
    count, unit = spoken(span).split()
    return f"timedelta({unit.removesuffix('s')}s={count})"
