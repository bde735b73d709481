"""The writer with an endpoint that answers correctly, or fails in every way. Each test uses a real socket."""

import asyncio
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from time import monotonic, process_time

import pytest

from app.errors import ModelFailed
from app.generation.prompt import SYSTEM, prompt_for, tip_schema
from app.stores import llm as writers
from app.stores.llm import LlmWriter, text_in
from tests.integration.stores.llm.conftest import KEY, OpenWriter
from tests.support.chat_server import (
    ChatServer,
    Plan,
    answers,
    closes,
    completion,
    floods,
    is_cut_short,
    is_silent,
    refuses_schemas,
    says,
    speaks_no_http,
    tip,
    trickles,
    trickles_its_head,
)
from tests.support.tip_requests import FINISHER, NOW, tip_request
from tests.support.waiting import eventually

REQUEST = tip_request("Renew the passport", notes="Photos first", due_at=NOW, priority=4, traits=FINISHER, locale="de")


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once unless the endpoint sends Retry-After."""
    monkeypatch.setattr(writers, "PAUSE_S", 0.0)


async def failure(writer: LlmWriter) -> ModelFailed:
    with pytest.raises(ModelFailed) as caught:
        await writer.write(REQUEST)
    assert type(caught.value).__name__ in ("ModelFailed", "Temporary")
    return caught.value


async def test_text_is_that_of_the_answer(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(says("Jetzt den Pass erneuern."))
    assert await writer.write(REQUEST) == "Jetzt den Pass erneuern."


async def test_request_has_model_messages_and_schema_only(endpoint: ChatServer, writer: LlmWriter) -> None:
    await writer.write(REQUEST)
    (asked,) = endpoint.asked
    assert asked.target == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.body == {
        "model": "m-1",
        "stream": False,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": prompt_for(REQUEST, "mark0")},
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "tip", "strict": True, "schema": tip_schema()},
        },
    }


async def test_mark_is_new_for_each_request(endpoint: ChatServer, writer: LlmWriter) -> None:
    for number in range(2):
        await writer.write(REQUEST)
        assert f"<task-mark{number}>" in endpoint.asked[number].prompt


async def test_no_key_is_sent_when_there_is_none(endpoint: ChatServer, open_writer: OpenWriter) -> None:
    async with open_writer(endpoint.url, key=None) as writer:
        await writer.write(REQUEST)
    assert "authorization" not in endpoint.asked[0].headers


async def test_connection_is_reused(endpoint: ChatServer, writer: LlmWriter) -> None:
    for _ in range(3):
        await writer.write(REQUEST)
    assert endpoint.connections == 1


async def test_environment_is_ignored(
    endpoint: ChatServer,
    open_writer: OpenWriter,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    netrc = tmp_path_factory.mktemp("home") / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NETRC", str(netrc))
    async with open_writer(endpoint.url, key=None) as writer:
        await writer.write(REQUEST)
    assert "authorization" not in endpoint.asked[0].headers


async def test_no_cookie_is_kept(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(answers(200, completion(tip("A tip.")), set_cookie="track=1; Path=/"))
    for _ in range(2):
        await writer.write(REQUEST)
    assert "cookie" not in endpoint.asked[1].headers


async def test_tip_that_contains_the_key_is_refused(endpoint: ChatServer, open_writer: OpenWriter) -> None:
    key = "sk-" + "0123456789" * 2
    endpoint.will(says(f"Your key is {key}."))
    async with open_writer(endpoint.url, key=key) as writer:
        failed = await failure(writer)
    assert (failed.reason, failed.well) == ("invalid answer", True)
    assert key not in str(failed)


async def test_tip_may_contain_a_short_key(endpoint: ChatServer, open_writer: OpenWriter) -> None:
    endpoint.will(says("None is like it."))
    async with open_writer(endpoint.url, key="None") as writer:
        assert await writer.write(REQUEST) == "None is like it."


NO_COMPLETIONS = [
    b"",
    b"null",
    b"<html>Sign in</html>",
    b"{}",
    b'{"choices": []}',
    b'{"choices": [{}]}',
    b'{"choices": "none"}',
    b'{"error": {"message": "no"}}',
    b"\xff\xfe",
    b"[" * 60_000,
    completion(17),
    completion([{"type": "text", "text": "a"}]),
]
NO_TIPS = [
    completion(None),
    completion(""),
    completion("Sure! Renew your passport."),
    completion('{"tip": "A tip."}'),
    completion('{"text": 17}'),
    completion('{"text": null}'),
    completion('{"text": "A tip.", "more": true}'),
    completion('["A tip."]'),
    completion(tip("A tip.")[:-3]),
    completion(tip("A tip.") * 2),
    completion("[" * 60_000),
    completion(tip("A tip."), finish_reason="length"),
    completion(tip("A tip."), finish_reason="content_filter"),
    completion(tip("A tip."), refusal="I will not."),
    completion('{"text": "\\ud800"}'),
]


async def test_answer_is_invalid_without_a_tip(endpoint: ChatServer, writer: LlmWriter) -> None:
    for body in (*NO_COMPLETIONS, *NO_TIPS):
        endpoint.will(answers(200, body))
        failed = await failure(writer)
        assert failed.reason == "invalid answer", body[:60]
        assert failed.well is (body in NO_TIPS), body[:60]  # a completion shows that the endpoint works
        assert len(endpoint.asked) == 1, body[:60]


@pytest.mark.parametrize(
    "content",
    [
        f"```json\n{tip('A tip.')}\n```",
        f"```\n{tip('A tip.')}```",
        f"\n ```JSON{tip('A tip.')}\n\n``` ",
        f"\n {tip('A tip.')} \n",
    ],
)
async def test_json_is_read_from_a_markdown_fence(endpoint: ChatServer, writer: LlmWriter, content: str) -> None:
    endpoint.will(answers(200, completion(content, finish_reason=None)))
    assert await writer.write(REQUEST) == "A tip."


@pytest.mark.parametrize("content", ["```", "```json\n{", "```json\n```"], ids=["open", "brace", "empty"])
@pytest.mark.parametrize("filler", [" ", "\n", "`"], ids=["space", "line", "tick"])
def test_unfinished_answer_is_parsed_in_linear_time(content: str, filler: str) -> None:
    # Without a schema, some models continue with spaces until they are cut off.
    body = completion(content + 3_000 * filler + "x")
    started = process_time()
    with pytest.raises(ModelFailed, match="not the JSON"):
        text_in(body)
    assert process_time() - started < 1


@pytest.mark.parametrize("plan", [floods, answers(200, b" " * 70_000)], ids=["without end", "announced"])
async def test_answer_is_invalid_when_it_is_too_long(endpoint: ChatServer, writer: LlmWriter, plan: Plan) -> None:
    endpoint.will(plan)
    failed = await failure(writer)
    assert (failed.reason, failed.well) == ("invalid answer", False)


async def test_compressed_answer_is_not_decompressed(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(answers(200, b"\x1f\x8b" + b"\0" * 100, content_encoding="gzip"))
    assert (await failure(writer)).reason == "invalid answer"


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (answers(429, retry_after="0"), "rate limited"),
        (answers(429), "rate limited"),
        (answers(429, retry_after="soon"), "rate limited"),
        (answers(500, b"<html>"), "server error"),
        (answers(503, retry_after="0.01"), "server error"),
        (answers(529), "server error"),
        (closes, "connection failed"),
        (speaks_no_http, "connection failed"),
    ],
    ids=["429 0", "429", "429 soon", "500", "503", "529", "closes", "no http"],
)
async def test_request_is_retried_once_after_a_temporary_failure(
    endpoint: ChatServer, writer: LlmWriter, first: Plan, reason: str
) -> None:
    endpoint.will(first, says("At the second try."))
    assert await writer.write(REQUEST) == "At the second try."
    endpoint.will(first)
    failed = await failure(writer)
    assert (failed.reason, failed.well) == (reason, False)
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize(
    ("plan", "reason", "well"),
    [
        (answers(401, b'{"error": "Incorrect API key provided: sk-top-secret"}'), "refused", False),
        (answers(403), "refused", False),
        (answers(404), "refused", False),
        (answers(413), "refused", True),
        (answers(301, location="/elsewhere"), "refused", False),
        (answers(307, location="http://127.0.0.1:1/v1"), "refused", False),
        (answers(301, location="mailto:somebody@example.org"), "refused", False),
        (answers(302, location="http://[::1/"), "refused", False),
        (answers(303, location="http://" + "a." * 300), "refused", False),
        (answers(204), "invalid answer", False),
        (is_cut_short, "connection failed", False),
    ],
    ids=["401", "403", "404", "413", "301", "307", "mail", "half", "long", "204", "cut"],
)
async def test_request_is_not_retried_after_a_permanent_failure(
    endpoint: ChatServer, writer: LlmWriter, plan: Plan, reason: str, well: bool
) -> None:
    endpoint.will(plan)
    failed = await failure(writer)
    assert (failed.reason, failed.well) == (reason, well)
    assert len(endpoint.asked) == 1
    assert KEY not in str(failed)


async def test_retry_waits_for_a_short_retry_after(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(answers(429, retry_after="0.2"), says("Later."))
    started = monotonic()
    assert await writer.write(REQUEST) == "Later."
    assert monotonic() - started >= 0.2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_request_is_not_retried_when_the_retry_after_is_too_long(
    endpoint: ChatServer, writer: LlmWriter, status: int, form: str
) -> None:
    later = datetime.now(UTC) + timedelta(seconds=30)
    endpoint.will(answers(status, retry_after="30" if form == "seconds" else format_datetime(later, usegmt=True)))
    failed = await failure(writer)
    assert failed.pause_s is not None
    assert 25 < failed.pause_s <= 30
    assert len(endpoint.asked) == 1


async def test_request_is_not_retried_when_too_little_time_is_left(
    endpoint: ChatServer, open_writer: OpenWriter
) -> None:
    endpoint.will(answers(500), says("Too late."))
    async with open_writer(endpoint.url, patience_s=5, least_s=6) as writer:
        assert (await failure(writer)).reason == "server error"


@pytest.mark.slow
@pytest.mark.parametrize("plan", [is_silent, trickles, trickles_its_head])
@pytest.mark.parametrize("before", [None, answers(500), refuses_schemas(closes)], ids=["", "500", "refuses"])
async def test_request_times_out(
    endpoint: ChatServer, open_writer: OpenWriter, plan: Plan, before: Plan | None
) -> None:
    endpoint.will(*([plan] if before is None else [before, plan]))
    async with open_writer(endpoint.url, patience_s=0.3) as writer:
        started = monotonic()
        failed = await failure(writer)
        assert (failed.reason, failed.well) == ("timeout", False)
        assert 0.29 <= monotonic() - started < 3  # the machine may be busy


@pytest.mark.slow
async def test_connection_times_out_when_it_is_not_accepted(open_writer: OpenWriter) -> None:
    with socket.socket() as full:  # a listener whose queue is full answers no further connection
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", port))
            async with open_writer(f"http://127.0.0.1:{port}/v1", connect_s=0.2) as writer:
                failed = await failure(writer)
        finally:
            for one in waiting:
                one.close()
    assert (failed.reason, str(failed)) == ("timeout", "no connection in time")


async def test_request_fails_when_the_port_is_closed(open_writer: OpenWriter) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        async with open_writer(f"http://127.0.0.1:{port}/v1") as writer:
            assert (await failure(writer)).reason == "connection failed"


@pytest.mark.parametrize("status", [400, 422])
async def test_schema_is_left_out_after_it_was_refused(endpoint: ChatServer, writer: LlmWriter, status: int) -> None:
    endpoint.will(refuses_schemas(says("Without."), status))
    for _ in range(3):
        assert await writer.write(REQUEST) == "Without."
    assert [asked.has_schema for asked in endpoint.asked] == [True, False, False, False]
    assert endpoint.asked[0].prompt.replace("mark0", "") == endpoint.asked[1].prompt.replace("mark0", "")


async def test_schema_is_sent_again_after_a_while(
    endpoint: ChatServer, writer: LlmWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "PLAIN_FOR_S", 0.0)
    endpoint.will(refuses_schemas(says("Without.")))
    for _ in range(2):
        await writer.write(REQUEST)
    assert [asked.has_schema for asked in endpoint.asked] == [True, False, True, False]


async def test_refused_schema_is_remembered_when_the_answer_is_no_tip(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(refuses_schemas(answers(200, completion("Prose."))))
    for _ in range(2):
        assert (await failure(writer)).reason == "invalid answer"
    assert [asked.has_schema for asked in endpoint.asked] == [True, False, False]


async def test_schema_is_sent_again_when_refused_without_it(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(answers(400))
    for _ in range(2):
        failed = await failure(writer)
        assert (failed.reason, failed.well) == ("refused", True)
    assert [asked.has_schema for asked in endpoint.asked] == [True, False] * 2


async def test_request_without_schema_is_retried_too(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(refuses_schemas(says("")), answers(500), says("At the third."))
    assert await writer.write(REQUEST) == "At the third."
    assert [asked.has_schema for asked in endpoint.asked] == [True, False, False]


async def test_many_requests_run_concurrently(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(answers(500), says("One of many."))
    texts = await asyncio.gather(*(writer.write(REQUEST) for _ in range(20)))
    assert texts == ["One of many."] * 20


async def test_connection_is_closed_when_the_request_is_cancelled(endpoint: ChatServer, writer: LlmWriter) -> None:
    endpoint.will(is_silent, says("The next."))
    task = asyncio.get_running_loop().create_task(writer.write(REQUEST))
    await eventually(lambda: endpoint.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await writer.write(REQUEST) == "The next."
    assert endpoint.connections == 2
