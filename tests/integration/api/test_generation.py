"""`POST /generate`: valid and invalid requests, and a tip in every state of the model."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, get_args

import httpx
import pytest
import pytest_asyncio

from app.api import generation
from app.bootstrap.health import sampler
from app.errors import FallbackReason, StoreUnavailable
from app.generation.generator import SKIP_AFTER
from app.generation.languages import phrases_of
from app.generation.prompt import PROMPT_VERSION
from tests.support.chat_server import (
    ChatServer,
    Plan,
    answers,
    chat_server,
    closes,
    completion,
    is_cut_short,
    refuses_schemas,
    says,
    tip,
)
from tests.support.events import body, feedback, served
from tests.support.live import API_KEYS, JSON, Live, as_caller, assert_refused, new_user, paths, problem
from tests.support.processes import ROOT
from tests.support.site import ServeSite
from tests.support.tip_requests import with_first_variant
from tests.support.waiting import eventually

KEY = "sk-top-secret"
TASK = {"id": "id-of-the-task", "title": "Renew the passport"}
HABITS = {"completion_rate_30d": 0.8, "preferred_hour": 9}


@pytest_asyncio.fixture(loop_scope="session")
async def endpoint() -> AsyncIterator[ChatServer]:
    async with chat_server() as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def modelled(serve_site: ServeSite, endpoint: ChatServer) -> AsyncIterator[Live]:
    async with serve_site(
        api_keys=API_KEYS, model_url=endpoint.url, model="m-1", model_key=KEY, model_calls=2, log_level="debug"
    ) as opened:
        yield opened


async def ask(site: Live, **fields: object) -> httpx.Response:
    return await site.client.post("/generate", json={"task": TASK, **fields}, headers=as_caller("reader"))


async def worded(site: Live, **fields: object) -> dict[str, Any]:
    answer = await ask(site, **fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert list(found) == [
        name for name in ("text", "source", "fallback_reason", "model", "prompt_version") if name in found
    ]
    assert found["prompt_version"] == PROMPT_VERSION
    return found


def is_for_finishers(text: str) -> bool:
    return any(variant in text for variant in phrases_of("en").encouragement["finisher"])


async def test_template_writes_the_tip_when_no_model_is_set(site: Live) -> None:
    answer = await worded(site, task={**TASK, "due_at": "2001-09-09T00:00:00+02:00", "priority": 5, "notes": "Photos."})
    assert {**answer, "text": with_first_variant(answer["text"], "unknown")} == {
        "text": "Important: “Renew the passport” was due on 9 September 2001. Start with one small step: two minutes "
        "are enough. Your note: “Photos”.",
        "source": "template",
        "prompt_version": PROMPT_VERSION,
    }
    assert (await worded(site, locale="de-AT"))["text"].startswith("„Renew the passport“ wartet auf dich.")


async def test_tip_is_as_the_readme_shows_it(site: Live) -> None:
    readme = (ROOT / "app/generation/README.md").read_text()
    asked, shown = re.search(r"/generate -d '(.*?)'\n.*?```json\n(.*?)```", readme, re.DOTALL).groups()  # type: ignore[union-attr]  # it is there
    answer = await site.client.post("/generate", content=asked, headers=JSON)
    said = answer.json()
    assert {**said, "text": with_first_variant(said["text"], "finisher")} == json.loads(shown)


async def test_every_reason_is_in_the_readme() -> None:
    readme = (ROOT / "app/generation/README.md").read_text()
    assert set(re.findall(r"^\| `([a-z ]+)` \| ", readme, re.MULTILINE)) >= set(get_args(FallbackReason))


async def test_tip_fits_the_profile_that_is_sent(site: Live) -> None:
    assert is_for_finishers((await worded(site, profile_features=HABITS))["text"])
    assert not is_for_finishers((await worded(site, profile_features={}))["text"])
    odd = {**HABITS, "mean_dwell_ms_30d": None, "shoe_size": [1, {"a": 2}], "preferred_hour": 10**40}
    assert is_for_finishers((await worded(site, profile_features=odd))["text"])


async def test_profile_of_the_user_is_read_when_none_is_sent(own_site: Live) -> None:
    site, user = own_site, new_user()
    for number in range(4):
        await site.send(served(user, site.now_ms - number), feedback(user, site.now_ms - number, action="completed"))
    assert is_for_finishers((await worded(site, user_id=user))["text"])
    assert not is_for_finishers((await worded(site, user_id=user, profile_features=None))["text"])
    assert not is_for_finishers((await worded(site, user_id=user, profile_features={}))["text"])
    assert not is_for_finishers((await worded(site, user_id=new_user()))["text"])


async def test_request_is_refused_when_a_field_is_invalid(site: Live) -> None:
    task = {
        "id": ("a/b", "x" * 129),
        "title": ("", "x" * 301, 7),
        "notes": ("x" * 4001,),
        "due_at": ("2026-11-25T09:00:00", "tomorrow"),
        "priority": ("high", True, 10**400),
        "more": (1,),
    }
    fields: dict[str, tuple[object, ...]] = {
        "task": (None,),
        "more": (1,),
        "user_id": ("..", 7),
        "locale": ("", "en_GB", "en\n", None),
        "profile_features": ([],),
    }
    features = {"completion_rate_30d": ("0.8", True), "preferred_hour": (9.5,)}
    bodies = [
        *(({"task": {"title": "T"}}, "task.id"), ({"task": {"id": "t"}}, "task.title")),
        *(({"task": {**TASK, name: value}}, f"task.{name}") for name, values in task.items() for value in values),
        *(({"task": TASK, name: value}, name) for name, values in fields.items() for value in values),
        *(
            ({"task": TASK, "profile_features": {name: value}}, f"profile_features.{name}")
            for name, values in features.items()
            for value in values
        ),
    ]
    await assert_refused(site, "/generate", bodies)
    too_large = json.dumps({"task": {**TASK, "priority": 7}}).replace("7}", "1e999}")
    answer = await site.client.post("/generate", content=too_large, headers=JSON)
    assert paths(problem(answer, 422)) == ["task.priority"]


async def test_tip_is_written_without_a_profile_when_reads_are_shed(
    own_site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(own_site.service.computation), "overloaded", property(lambda _: True))
    user = new_user()
    problem(await own_site.client.get(f"/profiles/{user}"), 503)
    assert (await worded(own_site, user_id=user))["source"] == "template"


@pytest.mark.parametrize("how", ["slow", "away"])
async def test_tip_is_written_without_a_profile_when_it_cannot_be_read(
    own_site: Live, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def read_values(wanted: object) -> object:
        if how == "away":
            raise StoreUnavailable("locked")
        return await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(own_site.service.reader, "read_values", read_values)
    monkeypatch.setattr(generation, "PROFILE_S", 0.05)
    assert (await worded(own_site, user_id=new_user()))["source"] == "template"


async def test_model_writes_a_tip_without_learning_the_ids(modelled: Live, endpoint: ChatServer) -> None:
    site, user = modelled, new_user()
    endpoint.will(says("Photos first,\nthen the form."))
    sent = body(*(feedback(user, site.now_ms - number, action="completed") for number in range(4)))
    answer = await site.client.post("/events", content=sent, headers={**JSON, **as_caller("writer")})
    assert answer.status_code == 202
    assert await worded(site, user_id=user, locale="de") == {
        "text": "Photos first, then the form.",
        "source": "model",
        "model": "m-1",
        "prompt_version": PROMPT_VERSION,
    }
    (asked,) = endpoint.asked
    assert "usually completes tips" in asked.prompt
    everything = json.dumps([asked.target, asked.headers, asked.body])
    assert user not in everything
    assert TASK["id"] not in everything


FAILURES: list[tuple[Plan, str]] = [
    (answers(500), "server error"),
    (answers(401, b"sk-top-secret"), "refused"),
    (answers(200, completion("Sure!")), "invalid answer"),
    (says("See https://evil.example"), "invalid answer"),
    (says("Hidden \u202e text"), "invalid answer"),
    (closes, "connection failed"),
    (is_cut_short, "connection failed"),
    (answers(429, retry_after="60"), "rate limited"),  # the last, because the model is not asked again for a minute
]


@pytest.mark.slow
async def test_template_writes_the_tip_when_the_model_fails(
    modelled: Live, endpoint: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for plan, reason in FAILURES:
        endpoint.will(says("A tip of the model."))
        assert (await worded(modelled))["source"] == "model"  # so that it is not skipped after some failures
        endpoint.will(plan)
        answer = await worded(modelled, profile_features=HABITS)
        assert (answer["source"], answer["fallback_reason"]) == ("template", reason)
        assert "model" not in answer
        assert is_for_finishers(answer["text"])
    written = capsys.readouterr()
    assert KEY not in written.err + written.out
    metrics = (await modelled.client.get("/metrics")).text
    for reason, times in Counter(reason for _, reason in FAILURES).items():
        assert f'profiles_generations_total{{outcome="{reason}"}} {times}.0' in metrics
    assert f"profiles_model_seconds_count {2 * len(FAILURES)}.0" in metrics


async def test_model_writes_a_tip_when_it_supports_no_schema(modelled: Live, endpoint: ChatServer) -> None:
    endpoint.will(refuses_schemas(answers(200, completion(f"```json\n{tip('Without a schema.')}\n```"))))
    assert (await worded(modelled))["text"] == "Without a schema."


async def test_model_is_skipped_when_it_keeps_failing(modelled: Live, endpoint: ChatServer) -> None:
    endpoint.will(answers(404))
    reasons = [(await worded(modelled))["fallback_reason"] for _ in range(SKIP_AFTER + 2)]
    assert reasons == ["refused"] * SKIP_AFTER + ["circuit open"] * 2
    assert len(endpoint.asked) == SKIP_AFTER


async def test_template_writes_the_tip_when_all_calls_are_in_use(modelled: Live, endpoint: ChatServer) -> None:
    gate = asyncio.Event()

    async def waits(asked: Any, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await says("At last.")(asked, writer)

    endpoint.will(waits)
    first = [asyncio.get_running_loop().create_task(worded(modelled)) for _ in range(2)]
    await eventually(lambda: len(endpoint.asked) == 2)
    assert (await worded(modelled))["fallback_reason"] == "busy"
    gate.set()
    assert [answer["source"] for answer in await asyncio.gather(*first)] == ["model", "model"]


@pytest.mark.slow
async def test_overview_reports_the_model_when_it_keeps_failing(modelled: Live, endpoint: ChatServer) -> None:
    own = sampler(modelled.service, "api")

    async def findings() -> list[dict[str, Any]]:
        await own.sample()
        answer = await modelled.client.get("/admin", headers={**as_caller("admin"), "Accept": "application/json"})
        return [item for item in answer.json()["findings"] if item["subject"] == "model"]

    assert (await worded(modelled))["source"] == "model"
    ready = (await modelled.client.get("/readyz")).json()
    assert await findings() == []
    endpoint.will(answers(401))
    for _ in range(SKIP_AFTER + 2):
        assert (await worded(modelled))["source"] == "template"
    (found,) = await findings()
    assert "refused (3), circuit open (2). It last wrote one at " in found["text"]
    answer = await modelled.client.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, ready)
