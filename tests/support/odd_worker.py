"""A worker with an odd learner and short job timeouts: `python -m tests.support.odd_worker [poison] [stuck]`.

`poison`: events with the tip `poison` cannot be learned from, until the file `cured` stands beside the database.
`stuck`: events with the tip `stuck` are learned from only when the file `go` stands there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from app.cli.common import exit_code, fail
from app.errors import ProfilesError
from app.events.ports import LoggedEvent
from app.settings import Settings
from app.stores.queue.worker import Pace
from app.worker import run
from tests.support.waiting import eventually

JOB_TIMEOUT_S = 2.0


class OddLearner:
    """Learns nothing."""

    def __init__(self, settings: Settings, oddities: list[str]) -> None:
        self._directory = settings.database.parent
        self._oddities = oddities

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        """Raise, or wait, where an event asks for it."""
        tips = {item.event.tip_id for item in events}
        if "poison" in tips and not (self._directory / "cured").exists():
            raise ValueError("this event cannot be learned from")
        if "stuck" in tips and "stuck" in self._oddities:
            await eventually((self._directory / "go").exists, timeout_s=60)


def main() -> None:
    """Run until SIGTERM."""
    try:
        settings = Settings.from_environment()
        learner = OddLearner(settings, sys.argv[1:])
        run(settings, pace=Pace(job_timeout_s=JOB_TIMEOUT_S), learners=[learner])
    except ProfilesError as error:
        fail(error)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
