"""A worker with a faulty learner and short job timeouts: `python -m tests.support.faulty_worker [stuck]`.

Learning from an event with the tip `poison` fails until the file `cured` exists beside the database. With `stuck`,
learning from an event with the tip `stuck` waits until the file `go` exists there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from app import worker
from app.bootstrap.service import OpenService
from app.cli.common import exit_code, fail
from app.errors import ProfilesError
from app.features.events import LoggedEvent
from app.settings import Settings
from tests.support.waiting import eventually

JOB_TIMEOUT_S = 2.0


class FaultyLearner:
    """Learns nothing."""

    def __init__(self, settings: Settings, *, stuck: bool) -> None:
        self._directory = settings.require_file().parent
        self._stuck = stuck

    async def learn(self, events: Sequence[LoggedEvent]) -> None:
        tips = {item.event.tip_id for item in events}
        if "poison" in tips and not (self._directory / "cured").exists():
            raise ValueError("this event cannot be learned from")
        if "stuck" in tips and self._stuck:
            await eventually((self._directory / "go").exists)


def main() -> None:
    try:
        settings = Settings.from_environment()
        learner = FaultyLearner(settings, stuck="stuck" in sys.argv[1:])

        def add_learner(service: OpenService) -> None:
            service.consumer.learners = [*service.consumer.learners, learner.learn]

        worker.JOB_TIMEOUT_S, worker.WORK_S = JOB_TIMEOUT_S, 0.9 * JOB_TIMEOUT_S
        worker.run(settings, on_ready=add_learner)
    except ProfilesError as error:
        fail(error)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
