"""`GET /admin/rollout` and its moves: figures, refusals, audit trail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.bandit.rollout.stages import serves_challenger
from tests.support.audit import newest_entries
from tests.support.decisions import HOUR_MS, move_to, rows_of, some, write
from tests.support.events import feedback
from tests.support.live import JSON, Live, assert_refused, paths, problem


async def seen(site: Live) -> dict[str, Any]:
    body: dict[str, Any] = await site.json("/admin/rollout")
    return body


async def decide(site: Live, decisions: int, *, share: float = 0.0, seed: int = 1, late_ms: int = 0) -> None:
    """Store settled decisions of days ago (or of `late_ms` ago), and run the worker's monitor once."""
    made_ms = site.now_ms - (late_ms or 100 * HOUR_MS)
    await write(site.service.database, rows_of(some(decisions, share=share, seed=seed), made_ms=made_ms))
    await site.service.bandit.rollout.watch()


async def test_rollout_begins_in_the_shadow(own_site: Live) -> None:
    assert (await own_site.client.get("/admin/rollout")).headers["vary"] == "Accept"
    body = await seen(own_site)
    assert (body["stage"], body["share"], body["changed_at"]) == ("shadow", 0.0, None)
    assert (body["champion"], body["challenger"], body["margin"]) == ("lints-v1", "lints-v2", 0.02)
    assert body["verdict"] == {
        "verdict": "insufficient data",
        "reason": "0 decisions can be evaluated; the first look is at 4,000.",
        "improved": False,
    }
    assert (body["figures"], body["looks"]) == (None, [])
    assert body["decisions"] == {
        "evaluated": 0,
        "waiting": 0,
        "unshadowed": 0,
        "served_by_challenger": 0,
        "next_look_at": 4_000,
        "without_prior": 0,
    }
    assert body["guardrails"]["p99_ms"] == {"value": None, "limit": 100.0, "judged": False}
    assert body["guardrails"]["slow_answers"] == {"value": None, "limit": 0.01, "judged": False}
    assert body["experiment"] is None
    assert body["guardrails"]["no_profile"] == {"value": None, "limit": 0.5, "judged": True}
    assert {item["move"]: item["allowed"] for item in body["moves"]} == {
        "ramp": False,
        "promote": False,
        "rollback": True,
    }
    assert body["states"] == {"users": 0, "to_grow": 0}


@pytest.mark.slow
async def test_figures_are_those_of_the_newest_look(own_site: Live) -> None:
    await decide(own_site, 4_000)
    body = await seen(own_site)
    figures = body["figures"]
    assert (figures["look"], figures["decisions"], figures["users"]) == (1, 4_000, 400)
    assert figures["level"] == pytest.approx(0.05 / 2)
    for name in ("ips", "snips", "doubly_robust", "champion", "lift"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    (kept,) = await own_site.service.bandit.rollout.repository.looks()
    for name, estimate in (("ips", kept.estimates.ips), ("snips", kept.estimates.snips), ("lift", kept.estimates.lift)):
        assert list(figures[name].values()) == list(estimate)
    lift = figures["doubly_robust"]["value"] - figures["champion"]["value"]
    assert figures["lift"]["value"] == pytest.approx(lift)
    assert abs(figures["mean_weight"] - 1) < 3 * figures["mean_weight_error"]
    assert figures["effective_sample_size"] > figures["effective_sample_size_needed"] == 1_000
    weights = [figures[f"champion_{name}"] for name in ("mean_weight", "mean_weight_error", "effective_sample_size")]
    assert weights == [1.0, 0.0, 4_000.0], "the champion served all users"
    assert (body["verdict"]["verdict"], body["verdict"]["improved"]) == ("promote", True)
    assert 0 < body["guardrails"]["dismissals"]["challenger"] < 1
    (look,) = body["looks"]
    assert (look["look"], look["stage"], look["verdict"]) == (1, "shadow", body["verdict"])
    page = (await own_site.client.get("/admin/rollout", headers={"Accept": "text/html"})).text
    assert "Looks so far" in page
    assert "<svg" not in page, "one look makes no line"


@pytest.mark.slow
async def test_latency_is_judged_when_the_challenger_serves_users(own_site: Live) -> None:
    slow = rows_of(some(1_000), made_ms=own_site.now_ms - 60_000, elapsed_us=400_000)
    await write(own_site.service.database, slow)
    rails = (await seen(own_site))["guardrails"]
    assert (rails["p99_ms"], rails["broken"]) == ({"value": 400.0, "limit": 100.0, "judged": False}, [])
    as_page = {"Accept": "text/html"}
    row = (await own_site.client.get("/admin/rollout", headers=as_page)).text.split("99th percentile of latency")[1]
    said = row.partition("</tr>")[0]
    for text in ("400 ms", "all answers of the last day, which are those of the champion", "not judged"):
        assert text in said
    assert "broken" not in said
    await move_to(own_site.service, "ramp", 0.05)
    lately: dict[str, object] = {"role": "challenger", "elapsed_us": 900_000, "created_at_ms": own_site.now_ms - 1_000}
    await write(own_site.service.database, [{**row, **lately} for row in slow])
    rails = (await seen(own_site))["guardrails"]
    assert rails["p99_ms"]["judged"]
    assert rails["broken"] == [
        "One answer in a hundred takes over 900 ms; 100 ms is allowed. "
        "At least 98.6% of the challenger's answers take longer."
    ]


@pytest.mark.slow
async def test_challenger_is_ramped_one_step_and_audited(own_site: Live) -> None:
    await decide(own_site, 4_000)
    answer = await own_site.client.post("/admin/rollout/ramp", json={"reason": "looks good"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["stage"], body["share"], body["reason"]) == ("ramp", 0.05, "looks good")
    assert body == await seen(own_site)
    again = problem(await own_site.client.post("/admin/rollout/ramp"), 409)
    assert "0 are settled; 200 are needed" in again["detail"]
    problem(await own_site.client.post("/admin/rollout/promote"), 409)
    back = await own_site.client.post("/admin/rollout/rollback")
    assert (back.json()["stage"], back.json()["reason"]) == ("rolled back", "no reason was given")
    problem(await own_site.client.post("/admin/rollout/rollback"), 409)
    anew = await own_site.client.post("/admin/rollout/ramp")
    assert (anew.json()["stage"], anew.json()["looks"], anew.json()["decisions"]["evaluated"]) == ("shadow", [], 0)
    entries = (await own_site.client.get("/admin/audit")).json()["entries"]
    assert [(entry["action"], entry["subject"]) for entry in reversed(entries)] == [
        *[("ramp roll-out", "rollout")] * 2,
        ("promote challenger", "rollout"),
        *[("roll back roll-out", "rollout")] * 2,
        ("ramp roll-out", "rollout"),
    ]
    assert entries[-1]["outcome"] == "done: shadow to 5%: looks good"


@pytest.mark.slow
async def test_challenger_is_promoted_when_it_serves_all_users(own_site: Live) -> None:
    await decide(own_site, 4_000)
    await move_to(own_site.service, "ramp", 1.0)
    await decide(own_site, 250, share=1.0, seed=2, late_ms=1_000)
    answer = await own_site.client.post("/admin/rollout/promote")
    assert answer.json()["stage"] == "promoted", answer.text


async def test_reason_of_a_move_is_stored(own_site: Live) -> None:
    problem(await own_site.client.post("/admin/rollout/ramp", json={"reason": "x" * 400}), 409)
    body = await own_site.json("/admin/rollout/rollback", "POST", json={"reason": "complaints"})
    assert body["reason"] == "complaints"
    (entry,) = await newest_entries(own_site.service.audit_trail, 1)
    assert entry.outcome == "done: shadow to rolled back: complaints"


async def test_move_is_refused_when_the_body_is_invalid(site: Live) -> None:
    bodies = [
        *(({"reason": reason}, "reason") for reason in ("x" * 401, "a\nb", 5, None)),
        ({"why": "complaints"}, "why"),
        (["complaints"], "$"),
    ]
    for move in ("ramp", "promote", "rollback"):
        path = f"/admin/rollout/{move}"
        await assert_refused(site, path, bodies)
        answer = problem(await site.client.post(f"{path}?reason=complaints"), 400)
        assert paths(answer) == ["reason"]
        problem(await site.client.post(path, content=b"{", headers=JSON), 400)
        problem(await site.client.post(path, content=b"another", headers={"Content-Type": "text/plain"}), 415)
    assert (await seen(site))["stage"] == "shadow"


async def test_form_redirects_to_the_page_with_its_result(own_site: Live) -> None:
    page = await own_site.client.get("/admin/rollout", headers={"Accept": "text/html"})
    token = page.text.split('name="csrf_token" value="')[1].split('"')[0]
    for path, said in (("ramp", "Nothing was changed"), ("rollback", "rolled back")):
        sent = {"csrf_token": token, "reason": "because"}
        answer = await own_site.client.post(f"/admin/rollout/{path}", data=sent)
        assert (answer.status_code, answer.headers["location"]) == (303, "/admin/rollout")
        shown = await own_site.client.get("/admin/rollout", headers={"Accept": "text/html"})
        assert said in shown.text
    sent = {"csrf_token": token, "seen": "unchanged"}
    await own_site.client.post("/admin/rollout/ramp", data=sent)
    (entry, *_) = (await own_site.client.get("/admin/audit")).json()["entries"]
    assert entry["outcome"].startswith("refused: the roll-out has changed")
    wrong = await own_site.client.post("/admin/rollout/ramp", data={"csrf_token": token, "reason": "x" * 401})
    assert paths(problem(wrong, 422)) == ["reason"]
    problem(await own_site.client.post("/admin/rollout/ramp", data={"reason": "because"}), 403)


@pytest.mark.parametrize("share", [0.0, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.05, 1.0))])
async def test_one_step_is_made_when_forms_race(own_site: Live, share: float) -> None:
    await decide(own_site, 4_000)
    if share:
        await move_to(own_site.service, "ramp", share)
        await decide(own_site, int(250 / share), share=share, seed=2, late_ms=1_000)
    page = (await own_site.client.get("/admin/rollout", headers={"Accept": "text/html"})).text
    token, seen_at = (page.split(f'name="{name}" value="')[1].split('"')[0] for name in ("csrf_token", "seen"))
    move, expected = ("promote", ("promoted", 1.0)) if share == 1 else ("ramp", ("ramp", 0.25 if share else 0.05))
    sent = {"csrf_token": token, "seen": seen_at}
    await asyncio.gather(*(own_site.client.post(f"/admin/rollout/{move}", data=sent) for _ in range(6)))
    assert (await own_site.service.bandit.rollout.repository.state())[:2] == expected
    outcomes = [entry.outcome.partition(":")[0] for entry in await newest_entries(own_site.service.audit_trail, 6)]
    assert sorted(outcomes) == ["done"] + ["refused"] * 5


async def test_overview_reports_an_automatic_rollback(own_site: Live) -> None:
    async def found() -> list[dict[str, Any]]:
        findings = (await own_site.client.get("/admin")).json()["findings"]
        return [item for item in findings if item["subject"] == "rollout"]

    assert await found() == []
    await move_to(own_site.service, "ramp", 0.25)
    slow = [{**row, "elapsed_us": 400_000} for row in rows_of(some(1_000, share=1.0), made_ms=own_site.now_ms - 5_000)]
    await write(own_site.service.database, slow)
    await own_site.service.bandit.rollout.watch()
    (told,) = await found()
    assert told["text"].startswith(
        "The roll-out was rolled back automatically. One answer in a hundred takes over 400 ms"
    )
    assert (told["state"], told["path"]) == ("degraded", "/admin/rollout")
    assert "begins anew" in told["advice"]
    await own_site.client.post("/admin/rollout/ramp")
    assert await found() == []
    await own_site.client.post("/admin/rollout/rollback")
    assert await found() == []  # an admin did it


@pytest.mark.slow
async def test_overview_reports_a_challenger_that_loses(own_site: Live) -> None:
    worse = some(4_000, skill=-1.5)
    await write(own_site.service.database, rows_of(worse))
    await move_to(own_site.service, "ramp", 0.05)
    await own_site.service.bandit.rollout.watch()
    assert (await seen(own_site))["verdict"]["verdict"] == "roll back"
    findings = (await own_site.client.get("/admin")).json()["findings"]
    (told,) = [item for item in findings if item["subject"] == "rollout"]
    assert "The challenger serves 5% of the users." in told["text"]
    assert "a loss of more than 0.02 for certain" in told["text"]


async def test_overview_reports_a_guardrail_broken_after_promotion(own_site: Live) -> None:
    await move_to(own_site.service, "promoted", 1.0)
    rows = rows_of(some(200, share=1.0), made_ms=own_site.now_ms - 5_000, profile_present=0)
    await write(own_site.service.database, rows)
    await own_site.service.bandit.rollout.watch()
    assert (await seen(own_site))["stage"] == "promoted", "nothing is done by itself"
    findings = (await own_site.client.get("/admin")).json()["findings"]
    (told,) = [item for item in findings if item["subject"] == "rollout"]
    assert told["text"].startswith("The challenger is promoted, and a guardrail is broken. 100.0% of the decisions")
    assert (told["state"], told["path"]) == ("degraded", "/admin/rollout")


async def test_ramp_is_refused_when_shadowing_is_off(serve_site: Any) -> None:
    async with serve_site(shadow=False) as site:
        body = await seen(site)
        assert body["challenger"] is None
        assert "PROFILES_SHADOW" in problem(await site.client.post("/admin/rollout/ramp"), 409)["detail"]
        page = await site.client.get("/admin/rollout", headers={"Accept": "text/html"})
        assert "There is no challenger" in page.text


@pytest.mark.slow
async def test_decisions_are_evaluated_and_the_share_selects_the_policy(
    own_site: Live,
) -> None:
    candidates = [
        {"id": f"t-{place}", "features": {"is_overdue": place == 1, "task_age_days": 3.0 * place, "priority": place}}
        for place in range(4)
    ]

    async def score(user: str) -> dict[str, Any]:
        answer = await own_site.client.post("/score", json={"user_id": user, "candidates": candidates})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    made = [(user, await score(user)) for user in [f"user-{number}" for number in range(10)] * 3]
    assert {body["policy"]["id"] for _, body in made} == {"lints-v1"}
    for number, (user, body) in enumerate(made[:-1]):
        told = feedback(
            user, own_site.now_ms, tip_id=body["chosen_id"], event_id=f"e-{number}", decision_id=body["decision_id"]
        )
        await own_site.send(told)
    waiting = await own_site.service.consumer.log.unconsumed(own_site.now_ms + 1, 100)
    await own_site.service.consumer.consume([item.seq for item in waiting])
    decisions = (await seen(own_site))["decisions"]
    assert (decisions["evaluated"], decisions["waiting"], decisions["unshadowed"]) == (0, 0, 0)
    assert decisions["without_prior"] == 29
    await move_to(own_site.service, "ramp", 0.25)
    for number in range(20):
        body = await score(f"user-{number}")
        expected = "lints-v2" if serves_challenger(f"user-{number}", 0.25, "1") else "lints-v1"
        assert body["policy"]["id"] == expected
    await own_site.service.database.execute("UPDATE rollout SET salt = 'another trial'")
    for number in range(20):
        served = serves_challenger(f"user-{number}", 0.25, "another trial")
        assert (await score(f"user-{number}"))["policy"]["id"] == ("lints-v2" if served else "lints-v1")
    await own_site.client.post("/admin/rollout/rollback")
    assert {(await score(f"user-{number}"))["policy"]["id"] for number in range(20)} == {"lints-v1"}
