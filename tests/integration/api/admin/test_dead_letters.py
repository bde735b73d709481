"""Dead letters: list, replay, discard."""

from __future__ import annotations

import asyncio
import json
import re
from functools import reduce
from typing import Any, cast

import pytest

from app.errors import StoreUnavailable
from app.features.ids import user_hash
from tests.support.audit import newest_entries
from tests.support.events import payload, served
from tests.support.live import Live, new_user, paths, problem

pytestmark = pytest.mark.both_engines


async def bury(site: Live, text: object) -> int:
    (letter,) = await site.service.dead_letters.bury_payloads([(json.dumps(text), "no event")], site.now_ms)
    return letter


async def listed(site: Live, after: int) -> list[dict[str, Any]]:
    letters: list[dict[str, Any]] = (await site.json(f"/admin/dead-letters?after={after}"))["dead_letters"]
    return letters


async def test_letters_are_listed_with_payload_and_reason(site: Live) -> None:
    letter = await bury(site, {"any": "thing"})
    (found,) = await listed(site, letter - 1)
    assert {name: value for name, value in found.items() if not name.endswith("_at")} == {
        "id": letter,
        "source": "queue",
        "payload": '{"any": "thing"}',
        "error": "no event",
        "traceback": "",
        "attempts": 1,
        "event_seq": None,
    }
    assert found["created_at"] == found["last_failed_at"]
    assert found["created_at"].endswith("Z")


@pytest.mark.parametrize("count", [4, 5])
async def test_letters_are_listed_page_by_page(own_site: Live, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("app.api.admin.dead_letters.LETTERS_PER_ANSWER", 2)
    letters = [await bury(own_site, number) for number in range(count)]
    seen: list[int] = []
    after: int | None = 0
    while after is not None:
        page = (await own_site.client.get(f"/admin/dead-letters?after={after}")).json()
        assert page.keys() == {"dead_letters", "next_after"}
        assert page["dead_letters"]
        seen.extend(item["id"] for item in page["dead_letters"])
        after = page["next_after"]
    assert seen == letters


async def test_event_is_stored_when_its_letter_is_replayed(site: Live) -> None:
    user = new_user()
    letter = await bury(site, payload(served(user, site.now_ms)))
    replayed = await site.json(f"/admin/dead-letters/{letter}/replay", "POST")
    assert replayed == {"accepted": 1, "duplicates": 0, "revived": False}
    assert (await site.features(user))["tip_volume_30d"] == 1
    assert await site.service.dead_letters.get(letter) is None
    problem(await site.client.post(f"/admin/dead-letters/{letter}/replay"), 404)


async def test_letter_is_deleted_when_its_event_is_a_duplicate(site: Live) -> None:
    event = served(new_user(), site.now_ms)
    await site.send(event)
    letter = await bury(site, payload(event))
    replayed = await site.json(f"/admin/dead-letters/{letter}/replay", "POST")
    assert replayed == {"accepted": 0, "duplicates": 1, "revived": False}
    assert await site.service.dead_letters.get(letter) is None


async def test_letter_stays_when_its_replay_is_refused(own_site: Live) -> None:
    event = served("of-a-user", own_site.now_ms, event_id="of-a-user-1")
    await own_site.send(event)
    invalid = await bury(own_site, {"user_id": "of-a-user", "subject": "of-a-user"})
    conflicting = await bury(own_site, {**payload(event), "tip_id": "another"})
    refused = await own_site.client.post(f"/admin/dead-letters/{invalid}/replay")
    assert paths(problem(refused, 422)) == ["subject"]
    problem(await own_site.client.post(f"/admin/dead-letters/{conflicting}/replay"), 409)
    assert [item["id"] for item in await listed(own_site, 0)] == [invalid, conflicting]
    entries = await newest_entries(own_site.service.audit_trail, 10)
    assert [entry.outcome for entry in entries] == [
        "refused: its event id is known with other content",
        "refused: still no valid event",
    ]
    assert "of-a-user" not in repr(entries)


async def test_event_is_unconsumed_again_when_its_letter_is_replayed(own_site: Live) -> None:
    site = own_site
    await site.send(served(new_user(), site.now_ms))
    (event,) = await site.service.consumer.log.unconsumed(site.now_ms + 1, 10)
    assert await site.service.dead_letters.failed(event.seq, "it failed", "Traceback", site.now_ms, 1)
    assert await site.service.consumer.log.unconsumed(site.now_ms + 1, 10) == []
    (letter,) = await listed(site, 0)
    assert (letter["source"], letter["event_seq"]) == ("consumption", event.seq)
    answer = await site.client.post(f"/admin/dead-letters/{letter['id']}/replay")
    assert answer.json() == {"accepted": 0, "duplicates": 0, "revived": True}
    assert [again.seq for again in await site.service.consumer.log.unconsumed(site.now_ms + 1, 10)] == [event.seq]
    assert await listed(site, 0) == []


async def test_letter_is_deleted_when_it_is_discarded(site: Live) -> None:
    letter = await bury(site, 1)
    answer = await site.client.delete(f"/admin/dead-letters/{letter}")
    assert (answer.status_code, answer.content) == (204, b"")
    problem(await site.client.delete(f"/admin/dead-letters/{letter}"), 404)


async def test_letter_is_not_found_when_it_does_not_exist(site: Live) -> None:
    for letter in ("999999999", "0", "-1", "abc", "1.0", str(2**63), "9" * 5_000):
        problem(await site.client.delete(f"/admin/dead-letters/{letter}"), 404)
        problem(await site.client.post(f"/admin/dead-letters/{letter}/replay"), 404)


async def test_list_is_refused_when_its_first_id_is_invalid(site: Live) -> None:
    for after in ("-1", "x", "", "1.5", str(2**63), "1&after=1"):
        assert paths(problem(await site.client.get(f"/admin/dead-letters?after={after}"), 400)) == ["after"], after


async def test_change_is_audited_when_a_letter_is_replayed_or_discarded(own_site: Live) -> None:
    first, second = await bury(own_site, payload(served(new_user(), own_site.now_ms))), await bury(own_site, 1)
    await own_site.client.post(f"/admin/dead-letters/{first}/replay")
    await own_site.client.delete(f"/admin/dead-letters/{second}")
    entries = await newest_entries(own_site.service.audit_trail, 10)
    assert [(entry.actor, entry.action, entry.subject) for entry in entries] == [
        ("anyone", "discard", f"dead-letter:{second}"),
        ("anyone", "replay", f"dead-letter:{first}"),
    ]


async def test_letter_is_returned_by_its_id(site: Live) -> None:
    letter = await bury(site, {"any": "thing"})
    answer = await site.client.get(f"/admin/dead-letters/{letter}")
    assert answer.status_code == 200
    assert answer.json() == (await listed(site, letter - 1))[0]


async def test_replay_of_all_letters_reports_the_failures(own_site: Live) -> None:
    user = new_user()
    fine = await bury(own_site, payload(served(user, own_site.now_ms)))
    bad = await bury(own_site, {"any": "thing"})
    answer = await own_site.client.post("/admin/dead-letters/replay")
    assert answer.status_code == 200
    body = answer.json()
    (failure,) = body.pop("failures")
    assert body == {"replayed": 1, "accepted": 1, "duplicates": 0, "revived": 0, "failed": 1, "next_after": None}
    assert failure["id"] == bad
    assert "subject" in failure["reason"]
    assert (await own_site.features(user))["tip_volume_30d"] == 1
    assert await own_site.service.dead_letters.get(fine) is None
    assert (await listed(own_site, 0))[0]["error"] == failure["reason"]
    (entry,) = await newest_entries(own_site.service.audit_trail, 1)
    assert (entry.action, entry.subject) == ("replay all", "dead-letters")
    assert entry.outcome == "done: 1 replayed, 1 still fail"


async def test_letters_above_an_id_are_replayed_when_it_is_given(own_site: Live) -> None:
    letters = [await bury(own_site, payload(served(new_user(), own_site.now_ms))) for _ in range(3)]
    answer = await own_site.client.post(f"/admin/dead-letters/replay?after={letters[1]}")
    assert answer.json()["replayed"] == 1
    assert [item["id"] for item in await listed(own_site, 0)] == letters[:2]


async def test_event_is_stored_once_when_replays_race(own_site: Live) -> None:
    user = new_user()
    letter = await bury(own_site, payload(served(user, own_site.now_ms)))
    answers = await asyncio.gather(
        *(own_site.client.post(f"/admin/dead-letters/{letter}/replay") for _ in range(5)),
        own_site.client.post("/admin/dead-letters/replay"),
    )
    assert {answer.status_code for answer in answers} <= {200, 404}
    assert sum(answer.json()["accepted"] for answer in answers if answer.status_code == 200) == 1
    assert (await own_site.features(user))["tip_volume_30d"] == 1


async def test_reason_is_audited_with_hashes_for_users_of_the_payload(own_site: Live) -> None:
    event = payload(served("ada", own_site.now_ms))
    deep = reduce(lambda inner, _: {"user_id": inner}, range(500), cast("object", ""))
    rows: list[tuple[object, str, str]] = [
        (event, "a test event of ada, <script>alert(1)</script>", "a test event of {ada}, <script>alert(1)</script>"),
        ({"userId": "ada"}, "ada's phone spells it userId", "{ada}'s phone spells it userId"),
        ([{"user_id": "ada"}, {"user_id": "ada-2"}], "ada and ada-2 in a list", "{ada} and {ada-2} in a list"),
        ({"event": {"user": {"user_ids": ["ada"]}}}, "nested: ada", "nested: {ada}"),
        ({"user_id": "a/da"}, "a/da is no id", "{a/da} is no id"),
        ({"user_id": 12}, "12 is a number", "{12} is a number"),
        ({"user_id": "ada"}, "用户ada坏了", "用户{ada}坏了"),
        ({"user_id": "", "tip_id": "ada"}, "canada, ada", "canada, ada"),
        (deep, "deep", "deep"),
    ]
    for content, reason, outcome in rows:
        letter = await bury(own_site, content)
        await own_site.client.delete(f"/admin/dead-letters/{letter}", params={"reason": reason})
        (entry,) = await newest_entries(own_site.service.audit_trail, 1)
        assert entry.outcome == "done: " + re.sub(r"\{(.+?)\}", lambda found: user_hash(found[1]), outcome), reason


async def test_letter_stays_when_the_reason_is_invalid(site: Live) -> None:
    letter = await bury(site, 1)
    for reason in ("x" * 401, "a\x00b", "two\nlines"):
        answer = await site.client.delete(f"/admin/dead-letters/{letter}", params={"reason": reason})
        assert paths(problem(answer, 400)) == ["reason"], reason
    assert await site.service.dead_letters.get(letter) is not None


async def test_nothing_is_discarded_when_the_audit_trail_cannot_be_written(
    own_site: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = await bury(own_site, 1)

    async def full(*_: object) -> None:
        raise StoreUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(own_site.service.audit_trail, "begin", full)
        problem(await own_site.client.delete(f"/admin/dead-letters/{letter}"), 503)
        problem(await own_site.client.post("/admin/dead-letters/replay"), 503)
    assert await own_site.service.dead_letters.get(letter) is not None
