"""What a diagnosis is made of. `app.stores` finds the facts, `app.operations.doctor` judges them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from app.operations.samples import Sample

State = Literal["ok", "warn", "bad"]


class Line(NamedTuple):
    """One line of a diagnosis. `check` is a stable name for scripts; `remedy` is empty where nothing is to be done."""

    check: str
    state: State
    text: str
    remedy: str = ""


class ServerFacts(NamedTuple):
    """A Redis or Valkey. `snapshots` None: it does not say. `ahead_ms`: of our clock; known to `unsure_ms`.

    `databases`: how many databases the workers of this queue store events in. `refuses` is what it says to a write or,
    as a cache, to anything that the service does with one; `write_error` what it says of its own persistence. Both are
    None where all is well.
    """

    flavour: str
    version: tuple[int, ...]
    run_id: str
    role: str
    maxmemory: int
    policy: str
    appends: bool
    snapshots: bool | None
    write_error: str | None
    refuses: str | None
    ahead_ms: int
    unsure_ms: int
    worker_alive: bool
    databases: int


class Unreached(NamedTuple):
    """A server that could not be asked, and why."""

    reason: str


class DatabaseFacts(NamedTuple):
    """The file and what is in it. `findings`: what is damaged; `whole`: whether everything was looked at.

    `unreadable`: users whose learned evidence is damaged; `damaged_priors`: pooled priors that are.
    `running`: the newest sample of each running process; `disabled`: by whom, when and why, by the feature.

    `kept`: of events and of decisions, up to which moment old ones have been deleted, and that of the oldest.

    `unknown_decisions`: who sent events within the last day that name no decision of their user, and how many.

    Ages are in seconds, None where there is nothing that could have one.
    """

    bytes: int
    wal_bytes: int
    links: int
    world_writable: bool
    findings: tuple[str, ...]
    whole: bool
    kept: Mapping[str, tuple[int | None, int | None]]
    unconsumed: int
    oldest_unconsumed_s: float | None
    dead_letters: int
    owed: int
    events_ahead: int
    unknown_decisions: Sequence[tuple[str, int]]
    unreadable: int
    damaged_priors: int
    newest_sample_s: float | None
    running: tuple[Sample, ...]
    disabled: Mapping[str, str]


class MachineFacts(NamedTuple):
    """Where the database lies, and what this process may do. `file_system` is empty where it is not known."""

    file_system: str
    mounted_at: str
    free_bytes: int
    disk_bytes: int
    open_files: int
    sqlite: tuple[int, ...]
