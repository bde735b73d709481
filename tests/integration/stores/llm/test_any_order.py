"""The model's adapter makes a request of any order, whatever its texts hold."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from app.generation.ports import Order
from tests.integration.stores.llm.conftest import OpenWriter
from tests.support.chat_server import ChatServer, says
from tests.support.tip_orders import ORDERS


@given(given_order=ORDERS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_order_is_carried_out(endpoint: ChatServer, open_writer: OpenWriter, given_order: Order) -> None:
    endpoint.will(says("A tip of the model."))
    async with open_writer(endpoint.url) as writer:
        assert await writer.write(given_order) == "A tip of the model."
