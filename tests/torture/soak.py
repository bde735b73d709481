"""The soak: requests of every kind, valid and invalid, and the memory of the processes meanwhile.

Users and ids are always new, so that memory kept for each request or user shows as growth.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from statistics import linear_regression
from time import monotonic, time

from app.features.clock import DAY_MS, rfc3339
from app.stores.queue.jobs import TIP_EVENTS
from tests.support.processes import resident_mib
from tests.torture.clients import Client
from tests.torture.deployment import Deployment
from tests.torture.model import FEATURES, values

CACHE_LIMIT = "8mb"  # new users fill it early; from then on it evicts, as in production
SAMPLE_EVERY_S = 2.0
HISTORY_ROWS = 50
TOO_LARGE = b"[" + b" " * 9_000_000 + b"]"
PROBES = ("/healthz", "/readyz", "/metrics", "/schema", "/schema/openapi.json")
INVALID = (400, 401, 404, 405, 415, 422, 501)
UNREADABLE_JOB = {"subject": "unreadable"}


class SoakClient(Client):
    """A client that sends unusual and invalid requests, too. Nothing fails, so it expects an answer to each."""

    strict = True

    def operations(self) -> dict[str, Callable[[], Awaitable[object]]]:
        return {
            **super().operations(),
            "new user": self._new_user,
            "past": lambda: self._get("past", f"/profiles/{self._user()}?as_of={self._past()}"),
            "history": self._history,
            "page": lambda: self._get("page", f"/admin/users/{self._user()}"),
            "data quality": lambda: self._get("data quality", "/admin/data-quality"),
            "probe": lambda: self._get("probe", self._random.choice(PROBES)),
            "invalid": self._invalid,
            "too large": lambda: self._ask("too large", "POST", "/events", [], TOO_LARGE, allowed=(413,)),
            "hang up": self._hang_up,
            "unreadable job": self._unreadable_job,
            "rebuild all": lambda: self._ask(
                "rebuild all", "POST", "/admin/rebuilds", [], {"scope": "all"}, allowed=(202, 409)
            ),
        }

    async def _get(self, name: str, path: str) -> None:
        await self._ask(name, "GET", path, [])

    async def _new_user(self) -> None:
        profile = (await self._ask("new user", "GET", f"/profiles/new-{self._pool.number()}", [])).good
        if profile and profile["features"] != dict(zip(FEATURES, values(()), strict=True)):
            self._run.violated(f"the profile of a new user is {profile!r}")

    async def _history(self) -> None:
        rows = [{"user_id": self._user(), "as_of": self._past()} for _ in range(HISTORY_ROWS)]
        await self._ask("history", "POST", "/profiles/history", [], {"rows": rows})

    async def _invalid(self) -> None:
        user, word = self._user(), f"word-{self._pool.number()}"
        requests: list[tuple[str, str, object]] = [
            ("GET", f"/{word}/{word}", None),
            ("GET", f"/profiles/{user}?{word}=1", None),
            ("GET", f"/profiles/{user}?features={word}", None),
            ("GET", "/profiles/%zz", None),
            (word.upper(), f"/profiles/{user}", None),
            ("POST", "/events", b"{"),
            ("POST", "/events", {word: 1}),
            ("POST", "/events", self._event().payload(f"{word}/")),
            ("POST", "/profiles/batch", {"user_ids": []}),
        ]
        method, path, body = self._random.choice(requests)
        await self._ask("invalid", method, path, [], body, allowed=INVALID)

    async def _unreadable_job(self) -> None:
        await self._queue.enqueue_job(TIP_EVENTS, [UNREADABLE_JOB])
        self._run.operations["unreadable job"] += 1

    async def _hang_up(self) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self._deployment.apis[0].port)
        writer.write(b"POST /events HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000\r\n\r\n[   ")
        await writer.drain()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        self._run.operations["hang up"] += 1

    def _user(self) -> str:
        return self._pool.pick(self._random).user_id

    def _past(self) -> str:
        return rfc3339(int(time() * 1000) - self._random.randrange(DAY_MS, 20 * DAY_MS))


class MemoryWatch:
    """Samples the resident memory of processes, in MiB."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._times: list[float] = []
        self._samples: dict[str, list[float]] = {name: [] for name in pids}

    async def run(self) -> None:
        started = monotonic()
        while True:
            self._times.append(monotonic() - started)
            for name, pid in self._pids.items():
                self._samples[name].append(resident_mib(pid))
            await asyncio.sleep(SAMPLE_EVERY_S)

    def report(self) -> list[str]:
        """One line for each process."""
        warm = _after_warm_up(self._times)
        return [f"resident memory in MiB over {self._times[-1] / 60:.1f} minutes"] + [
            f"  {name:9}  {line[0]:.1f} at start, {line[warm]:.1f} after the first third, {line[-1]:.1f} at the end, "
            f"{growth_mib(self._times, line):+.1f} by regression since the first third"
            for name, line in self._samples.items()
        ]

    def violations(self, limit_mib: float) -> list[str]:
        return [
            f"the memory of {name} grew by {growth_mib(self._times, line):.1f} MiB, more than {limit_mib:g} MiB"
            for name, line in self._samples.items()
            if growth_mib(self._times, line) > limit_mib
        ]


def growth_mib(times: Sequence[float], samples: Sequence[float]) -> float:
    """The growth since the first third of the time, which is the warm-up, by linear regression."""
    warm = _after_warm_up(times)
    if len(times) - warm < 2:
        return 0.0
    return linear_regression(times[warm:], samples[warm:]).slope * (times[-1] - times[warm])


def _after_warm_up(times: Sequence[float]) -> int:
    return next(index for index, time_s in enumerate(times) if time_s >= times[-1] / 3)


async def watch(deployment: Deployment) -> MemoryWatch:
    """Limit the cache's memory, and watch the API processes, the workers and the cache server."""
    await deployment.ask(deployment.cache, "CONFIG", "SET", "maxmemory", CACHE_LIMIT, "maxmemory-policy", "allkeys-lru")
    server = await deployment.ask(deployment.cache, "INFO", "server")
    return MemoryWatch({**deployment.pids(), "cache": int(server["process_id"])})
