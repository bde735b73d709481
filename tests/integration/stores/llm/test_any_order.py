"""The writer sends any request for a tip, whatever its texts contain."""

from hypothesis import HealthCheck, given, settings

from app.generation.tip_request import TipRequest
from tests.integration.stores.llm.conftest import OpenWriter
from tests.support.chat_server import ChatServer, says
from tests.support.tip_requests import REQUESTS


@given(asked=REQUESTS)
@settings(max_examples=settings().max_examples // 3, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_request_is_sent(endpoint: ChatServer, open_writer: OpenWriter, asked: TipRequest) -> None:
    endpoint.will(says("A tip of the model."))
    async with open_writer(endpoint.url) as writer:
        assert await writer.write(asked) == "A tip of the model."
