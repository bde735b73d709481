"""A graph in two columns, laid out for a drawing: which subject's events make which feature untrue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROW, BOX, LEFT, RIGHT, WIDTH = 46, 34, 200, 330, 560


class Node(NamedTuple):
    """A box by its upper left corner."""

    name: str
    x: int
    y: int
    width: int
    height: int


class Curve(NamedTuple):
    """A curve as SVG's path commands, and what it joins."""

    path: str
    source: str
    target: str


class Drawing(NamedTuple):
    """Everything a template needs to write the SVG."""

    width: int
    height: int
    nodes: list[Node]
    edges: list[Curve]


def drawn(joined: Mapping[str, Sequence[str]], targets: Sequence[str]) -> Drawing:
    """`joined` from each source to its targets; sources stand left, `targets` right, each column in the middle."""
    rows = max(len(joined), len(targets))
    height = rows * ROW + 12

    def top(place: int, count: int) -> int:
        return round((height - count * ROW) / 2 + place * ROW + (ROW - BOX) / 2)

    sources = {name: Node(name, 2, top(place, len(joined)), LEFT, BOX) for place, name in enumerate(joined)}
    sinks = {
        name: Node(name, RIGHT, top(place, len(targets)), WIDTH - RIGHT - 2, BOX) for place, name in enumerate(targets)
    }
    edges = [
        Curve(_curve(sources[source], sinks[target]), source, target)
        for source, names in joined.items()
        for target in names
    ]
    return Drawing(WIDTH, height, [*sources.values(), *sinks.values()], edges)


def _curve(source: Node, sink: Node) -> str:
    x1, y1, x2, y2 = source.x + source.width, source.y + BOX // 2, sink.x, sink.y + BOX // 2
    middle = (x1 + x2) // 2
    return f"M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}"
