"""The parameters of a run, and the modes: presets of them for one question each."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.torture.deployment import Deployment
from tests.torture.faults import FAULTS, ON_ONE_CACHE, ON_ONE_HOST
from tests.torture.plan import Step, draw_plan

# Operations of the clients, by weight.
USUAL = {
    "read": 62, "batch": 6, "send": 22, "edge": 3, "publish": 4, "rebuild": 3, "rebuild several": 0.5, "erase": 1.5,
    "score": 3
}  # fmt: skip
INGEST = {"send": 60, "send many": 6, "read": 34}
MIXED = {
    **USUAL, "new user": 10, "past": 1, "history": 0.5, "page": 0.4, "data quality": 0.02, "probe": 1.5, "invalid": 8,
    "too large": 0.01, "hang up": 0.3, "unreadable job": 0.03, "rebuild all": 0.02
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The parameters of a run. The seed determines all random choices.

    `rate_per_s` is the rate of faults, `hesitate` is described in `tests.torture.launcher`, and `pause_s` is the mean
    pause of a client between operations. Without `faults`, all of the deployment happen. `operations` and `kills` end
    the run early, after so many operations or kills of an API process. With `memory_limit_mib`, the memory of the
    processes is watched, and a growth beyond the limit is a violation. With `postgres`, the processes run on three
    hosts, and `apis` and `disk` have no effect; with `cluster`, the cache is a cluster, too.
    """

    seed: int = 5
    seconds: float = 300.0
    clients: int = 10
    users: int = 40
    apis: int = 2
    rate_per_s: float = 1.0
    hesitate: str = "0.02:0.02"
    faults: Sequence[str] | None = None
    weights: Mapping[str, float] = field(default_factory=lambda: USUAL)
    pause_s: float = 0.0
    mutant: str | None = None
    stop_at_first: bool = False
    disk: Path | None = None
    operations: int = 0
    kills: int = 0
    memory_limit_mib: float = 0.0
    postgres: bool = False
    cluster: bool = False

    def available(self) -> Mapping[str, Callable[[Any, Random], AbstractAsyncContextManager[None]]]:
        """The faults of the deployment, by name."""
        if not self.postgres:
            return FAULTS
        from tests.torture.host_faults import CLUSTER_FAULTS, HOST_FAULTS  # noqa: PLC0415  # psycopg is optional

        excluded = ON_ONE_HOST | ON_ONE_CACHE if self.cluster else ON_ONE_HOST
        common = {name: fault for name, fault in FAULTS.items() if name not in excluded}
        return common | HOST_FAULTS | (CLUSTER_FAULTS if self.cluster else {})

    def plan(self) -> list[Step]:
        faults = list(self.available()) if self.faults is None else self.faults
        return draw_plan(self.seed, self.seconds, faults, self.rate_per_s) if faults else []

    def deployment(self) -> Deployment:
        if not self.postgres:
            return Deployment(apis=self.apis, mutant=self.mutant, hesitate=self.hesitate, disk=self.disk)
        from tests.torture.hosts import HostsDeployment  # noqa: PLC0415  # psycopg is optional

        return HostsDeployment(cluster=self.cluster, mutant=self.mutant, hesitate=self.hesitate)


MODES: Mapping[str, Mapping[str, Any]] = {
    # Every answer is explained, whatever fails.
    "faults": {},
    # Every acknowledged event is stored once when API processes are killed during ingest. Three processes: while one
    # starts, others serve.
    "durability": {
        "seconds": 7_200.0, "kills": 500, "faults": ("api_killed",), "rate_per_s": 0.8, "apis": 3, "hesitate": "",
        "weights": INGEST,
    },
    # An event that one process acknowledged is seen by the others at once.
    "relay": {"operations": 20_000, "faults": (), "hesitate": "", "weights": {"relay": 1}},
    # Memory does not grow under a steady load of everything that clients send, about 300 operations a second.
    "soak": {
        "seconds": 600.0, "faults": (), "apis": 1, "hesitate": "", "weights": MIXED, "pause_s": 0.03,
        "memory_limit_mib": 16.0,
    },
}  # fmt: skip
