"""What every writer keeps to: the template and the model's adapter behind one port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings

from app.generation.ports import Order, Writer
from app.generation.template import TemplateWriter
from app.generation.text_rules import links, problem_of, tidied
from tests.chat.conftest import OpenWriter
from tests.generation.orders import FINISHER, NOW, ORDERS, order
from tests.support.chat_server import ChatServer, says


@pytest_asyncio.fixture(params=["template", "model"])
async def any_writer(
    request: pytest.FixtureRequest, endpoint: ChatServer, open_writer: OpenWriter
) -> AsyncIterator[Writer]:
    """Each of them; the model answers well."""
    if request.param == "template":
        yield TemplateWriter()
        return
    endpoint.will(says("A tip of the model."))
    async with open_writer(endpoint.url) as writer:
        yield writer


@given(given_order=ORDERS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_order_is_carried_out(any_writer: Writer, given_order: Order) -> None:
    text = await any_writer.write(given_order)
    task = given_order.task
    assert problem_of(tidied(text), may_link=links(task.title + (task.notes or ""))) is None


async def test_same_order_has_the_same_text(any_writer: Writer) -> None:
    full = order("T", notes="N", due_at=NOW, priority=4, traits=FINISHER, locale="de")
    assert await any_writer.write(full) == await any_writer.write(full)


async def test_orders_do_not_disturb_one_another(any_writer: Writer) -> None:
    orders = [order(f"Task {number}") for number in range(10)]
    alone = [await any_writer.write(one) for one in orders]
    assert list(await asyncio.gather(*map(any_writer.write, orders))) == alone
