"""What operations need from outside: where samples and states are kept. `app.stores.sqlite.samples` implements it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from app.operations.samples import Sample
from app.operations.states import ComponentStatus


class Record(NamedTuple):
    """What is kept: samples, oldest first, and how each component stands."""

    samples: list[Sample]
    standings: dict[str, ComponentStatus]


class SampleStore(Protocol):
    """Samples of the last hour and a little more, and the states. Raises `StoreUnavailable`."""

    async def keep(self, sample: Sample) -> None:
        """Keep one; bring the states up to date by what all processes saw lately; forget what is too old."""
        ...

    async def since(self, at_ms: int) -> Record:
        """What is kept since a moment."""
        ...
