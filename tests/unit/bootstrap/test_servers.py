"""The generator of tips is opened as the settings say, and costs a start without a model nothing."""

from msgspec import UNSET

from app.bootstrap.servers import open_tip_generator
from app.settings import Settings
from app.telemetry import Metrics
from tests.support.chat_server import chat_server, says
from tests.support.clock import FakeClock
from tests.support.tip_requests import tip_request


async def test_template_words_when_no_model_is_set() -> None:
    async with open_tip_generator(Settings(), FakeClock(), Metrics()) as tips:
        written = await tips.write(tip_request())
    assert (written.model, written.fallback_reason) == (UNSET, UNSET)


async def test_model_words_when_one_is_set() -> None:
    async with chat_server() as endpoint:
        endpoint.will(says("A tip."))
        settings = Settings(model_url=endpoint.url, model="m-1", model_key="k")
        async with open_tip_generator(settings, FakeClock(), Metrics()) as tips:
            written = [await tips.write(tip_request()) for _ in range(2)]
    assert [(one.text, one.model) for one in written] == [("A tip.", "m-1")] * 2
    marks = {asked.prompt.partition("<task-")[2].partition(">")[0] for asked in endpoint.asked}
    assert len(marks) == 2
    assert all(len(mark) == 16 for mark in marks)
