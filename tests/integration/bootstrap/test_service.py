"""The parts of a process. Type checks do not notice a part that is declared and never built."""

from pathlib import Path

from app.bootstrap.service import OpenService, open_service
from app.service import Service
from app.settings import Settings


async def test_every_part_is_built_when_service_opens(database_path: Path) -> None:
    async with open_service(Settings(database=database_path), door="command") as service:
        assert vars(service).keys() == {**Service.__annotations__, **OpenService.__annotations__}.keys()
