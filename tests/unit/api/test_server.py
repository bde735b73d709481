"""The limit on connections of a process follows its limit on open files."""

import resource

import pytest

from app.api.server import CONNECTIONS, FILES_LEFT, connections

FOR_EVER = resource.RLIM_INFINITY
ENOUGH = CONNECTIONS + FILES_LEFT


class System:
    """Limits of open files; if `lets` is false, a process may not change its own."""

    def __init__(self, soft: int, hard: int, *, lets: bool = True) -> None:
        self.limits = (soft, hard)
        self._lets = lets

    def get(self, _: int) -> tuple[int, int]:
        return self.limits

    def set(self, _: int, limits: tuple[int, int]) -> None:
        if not self._lets:
            raise OSError("not permitted")
        self.limits = limits


@pytest.mark.parametrize(
    ("system", "taken", "soft"),
    [
        (System(1_024, 100_000), CONNECTIONS, ENOUGH),
        (System(1_024, FOR_EVER), CONNECTIONS, ENOUGH),
        (System(1_024, 2_048), 2_048 - FILES_LEFT, 2_048),
        (System(1_024, 2_048, lets=False), 1_024 - FILES_LEFT, 1_024),
        (System(200, 200), FILES_LEFT, 200),
        (System(100_000, 100_000), CONNECTIONS, 100_000),
        (System(FOR_EVER, FOR_EVER), CONNECTIONS, FOR_EVER),
    ],
)
def test_connections_follow_the_limit_of_open_files(
    monkeypatch: pytest.MonkeyPatch, system: System, taken: int, soft: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", system.get)
    monkeypatch.setattr(resource, "setrlimit", system.set)
    assert connections() == taken
    assert system.limits[0] == soft, "it is raised as far as needed, and no further"
