"""What every Python client promises: blocking and asyncio, on a real service and on the fake one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from math import nan
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from profiles_client import (
    AsyncProfiles,
    Candidate,
    Conflict,
    FakeAsyncProfiles,
    FakeProfiles,
    Invalid,
    ProfileFeatures,
    Profiles,
    TipFeedback,
    TipServed,
)
from tests.support.live import new_user
from tests.support.python_client import opened

# The registry of the tests is fixed, and a feature may have been added to the client's contract.
pytestmark = pytest.mark.filterwarnings("ignore::profiles_client.ContractWarning")
COLD = {
    "completion_rate_30d": None,
    "dismiss_rate_30d": None,
    "mean_dwell_ms_30d": None,
    "preferred_hour": None,
    "tip_volume_30d": 0,
}
CANDIDATES = [Candidate("t-1", True, 3.5, 2), Candidate("t-2", False, 12, 1)]
TOO_MANY = [Candidate(f"t-{number}", True, 1, 1) for number in range(101)]
ZONE = timezone(timedelta(hours=5, minutes=30))
# Long enough for a busy machine. No test waits for it.
DEADLINE_S = 30.0


@pytest_asyncio.fixture(params=[Profiles, AsyncProfiles, FakeProfiles, FakeAsyncProfiles])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    kind = request.param
    fake = kind in (FakeProfiles, FakeAsyncProfiles)
    arguments = () if fake else (request.getfixturevalue("service_url"),)
    async with opened(kind(*arguments, deadline_s=DEADLINE_S)) as ready:
        yield ready


def now() -> datetime:
    return datetime.now(ZONE)


def served(user: str, at: datetime | None = None, **fields: Any) -> TipServed:
    return TipServed(**{"user_id": user, "tip_id": "tip", "occurred_at": at or now(), **fields})


def feedback(user: str, at: datetime | None = None, **fields: Any) -> TipFeedback:
    given = {"user_id": user, "tip_id": "tip", "occurred_at": at or now(), "action": "completed", **fields}
    return TipFeedback(**given)


def shown(features: ProfileFeatures) -> dict[str, Any]:
    return {name: getattr(features, name) for name in COLD}


async def test_unknown_user_has_defaults(client: Any) -> None:
    features = await client.profile(new_user())
    assert isinstance(features, ProfileFeatures)
    assert shown(features) == COLD


async def test_read_reflects_sent_events(client: Any) -> None:
    user, at = new_user(), now()
    receipt = await client.send(
        [
            served(user, at),
            served(user, at),
            feedback(user, at, dwell_ms=1_000),
            feedback(user, at, action="dismissed", dwell_ms=3_000),
            feedback(user, at, action="snoozed"),
            feedback(user, at, action="dismissed"),
        ]
    )
    assert (receipt.accepted, receipt.duplicates, receipt.invalidated) == (6, 0, True)
    assert shown(await client.profile(user)) == {
        "completion_rate_30d": 0.25,
        "dismiss_rate_30d": 0.5,
        "mean_dwell_ms_30d": 2_000.0,
        "preferred_hour": at.hour,
        "tip_volume_30d": 2,
    }


ODD = ("batch", "history", "nö", "a b", "%2F", "%", "?a=b&c#d", "😀", "a;b,c", "...", "a\\b", '"', "+", "\xa0")


async def test_any_id_can_be_read(client: Any) -> None:
    for user in (user for odd in ODD for user in (odd, new_user(odd), odd.ljust(128, "x"))):
        await client.send(served(user))
        count = (await client.profile(user)).tip_volume_30d
        assert count > 0, user
        assert (await client.profiles([user]))[user].tip_volume_30d == count, user


async def test_invalid_id_is_named(client: Any) -> None:
    for user in ("", ".", "..", "a/b", "x" * 129, "a\nb", "a\n", "\x7f", "\x85", "\ud800", None, 1, b"ann"):
        with pytest.raises(Invalid) as one:
            await client.profile(user)
        assert [issue.path for issue in one.value.issues] == ["user_id"], user
        with pytest.raises(Invalid) as many:
            await client.profiles(["ann", "ann", user])
        assert [issue.path for issue in many.value.issues] == ["user_ids[2]"], user


async def test_text_is_no_list_of_ids(client: Any) -> None:
    for call, path in ((client.profiles, "user_ids"), (client.history, "rows")):
        with pytest.raises(Invalid) as caught:
            await call("ann")
        assert [issue.path for issue in caught.value.issues] == [path]


@pytest.mark.slow
async def test_many_users_are_read_in_several_requests(client: Any) -> None:
    users = [new_user() for _ in range(2_345)]
    await client.send([served(users[7]), served(users[2_222])])
    found = await client.profiles([*users, users[7]])
    assert list(found) == users
    assert {user for user in users if found[user].tip_volume_30d} == {users[7], users[2_222]}
    assert await client.profiles([]) == {}


async def test_event_sent_again_is_a_duplicate(client: Any) -> None:
    event = served(new_user())
    assert (await client.send(event)).accepted == 1
    again = await client.send([event, event])
    assert (again.accepted, again.duplicates) == (0, 2)
    with pytest.raises(Conflict):
        await client.send(served(event.user_id, event_id=event.event_id, tip_id="another"))


async def test_many_events_are_sent_in_several_requests(client: Any) -> None:
    user = new_user()
    receipt = await client.send(served(user) for _ in range(2_345))
    assert receipt.accepted == 2_345
    assert (await client.profile(user)).tip_volume_30d == 2_345


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"occurred_at": datetime(2026, 1, 1)}, "[1].occurred_at"),  # noqa: DTZ001  # without an offset
    ({"occurred_at": datetime.now(UTC) + timedelta(hours=1)}, "[1].occurred_at"),
    ({"action": "liked"}, "[1].action"),
    ({"dwell_ms": -1}, "[1].dwell_ms"),
    ({"tip_id": "a/b"}, "[1].tip_id"),
    ({"tip_id": "\n"}, "[1].tip_id"),
    ({"event_id": ""}, "[1].event_id"),
]


async def test_invalid_event_is_named_and_nothing_is_stored(client: Any) -> None:
    for fields, path in INVALID:
        user = new_user()
        with pytest.raises(Invalid) as caught:
            await client.send([feedback(user), feedback(user, **fields)])
        assert [issue.path for issue in caught.value.issues] == [path], fields
        assert shown(await client.profile(user)) == COLD


async def test_invalid_item_is_named_when_it_is_in_a_later_request(client: Any) -> None:
    user = new_user()
    events = [feedback(user) for _ in range(1_200)]
    with pytest.raises(Invalid) as caught:
        await client.send([*events, feedback(user, action="liked")])
    assert [issue.path for issue in caught.value.issues] == ["[1200].action"]
    assert "[1200].action" in str(caught.value)
    with pytest.raises(Invalid) as caught:
        await client.profiles([*(f"{user}-{number}" for number in range(1_200)), "a/b"])
    assert [issue.path for issue in caught.value.issues] == ["user_ids[1200]"]


async def test_text_that_is_not_unicode_is_rejected(client: Any) -> None:
    with pytest.raises(Invalid, match="Unicode"):
        await client.send(served("ann", tip_id="\ud800"))


async def test_decision_chooses_a_candidate(client: Any) -> None:
    user = new_user()
    decision = await client.decide(user, CANDIDATES, at=now())
    assert decision.user_id == user
    assert decision.chosen_id in {"t-1", "t-2"}
    assert {item.id for item in decision.ranking} == {"t-1", "t-2"}
    assert sum(item.probability for item in decision.ranking) == pytest.approx(1)
    assert [item.score for item in decision.ranking] == sorted((item.score for item in decision.ranking), reverse=True)


@pytest.mark.parametrize("action", ["completed", "dismissed", "snoozed"])
async def test_decision_reports_what_became_of_its_tip(client: Any, action: str) -> None:
    user, at = new_user(), now()
    decision = await client.decide(user, CANDIDATES, at=at)
    report = getattr(decision, action)
    assert (await decision.served()).accepted == 1
    assert (await report(dwell_ms=40)).accepted == 1
    assert (await decision.served()).duplicates == 1
    assert (await report(dwell_ms=40)).duplicates == 1
    features = await client.profile(user)
    assert features.tip_volume_30d == 1
    assert features.mean_dwell_ms_30d == 40
    assert features.completion_rate_30d == (action == "completed")
    assert features.dismiss_rate_30d == (action == "dismissed")
    if action == "completed":
        assert features.preferred_hour in {at.hour, now().hour}  # of the user's zone


async def test_invalid_candidates_are_rejected(client: Any) -> None:
    for candidates in ([], [CANDIDATES[0], CANDIDATES[0]], [Candidate("a/b", True, 1, 1)], TOO_MANY):
        with pytest.raises(Invalid) as caught:
            await client.decide("ann", candidates)
        assert caught.value.issues[0].path.startswith("candidates"), candidates[:2]


async def test_history_has_each_row_at_its_moment_in_order(client: Any) -> None:
    user, moment = new_user(), now() - timedelta(days=2)
    step = timedelta(milliseconds=1)
    await client.send([served(user, moment), served(user, moment + 2 * step)])
    asked = [(user, moment + 2 * step), (user, moment - step), ("cold", moment), (user, moment)]
    rows = await client.history(asked)
    assert [row.features.tip_volume_30d for row in rows] == [2, 0, 0, 1]
    assert [row.user_id for row in rows] == [user, user, "cold", user]
    assert all(abs(row.as_of - at) <= step for row, (_, at) in zip(rows, asked, strict=True))
    assert [row.features.tip_volume_30d for row in await client.history(asked, known_at="as_of")] == [0, 0, 0, 0]


async def test_history_names_an_invalid_row(client: Any) -> None:
    for row in (
        None,
        nan,
        (),
        ("ann",),
        ("ann", now(), 1),
        ("ann", "yesterday"),
        ("ann", None),
        ("ann", nan),
        (nan, now()),
    ):
        with pytest.raises(Invalid) as caught:
            await client.history([("ann", now()), row])
        assert [issue.path.partition(".")[0] for issue in caught.value.issues] == ["rows[1]"], row


async def test_history_names_an_invalid_known_at(client: Any) -> None:
    for known_at in ("yesterday", datetime(2026, 1, 1)):  # noqa: DTZ001  # without an offset
        with pytest.raises(Invalid) as caught:
            await client.history([("ann", now())], known_at=known_at)
        assert [issue.path for issue in caught.value.issues] == ["known_at"]


async def test_history_of_a_decision_is_what_was_served(client: Any) -> None:
    user = new_user()
    await client.send(served(user))
    decision = await client.decide(user, CANDIDATES)
    await decision.served()
    (row,) = await client.history([decision.id])
    assert row.user_id == user
    assert row.features.tip_volume_30d == 1
    with pytest.raises(Invalid) as caught:
        await client.history(["no-decision"])
    assert [issue.path for issue in caught.value.issues] == ["rows[0].decision_id"]


async def test_history_adds_the_features_to_a_frame(client: Any) -> None:
    import pandas as pd  # noqa: PLC0415  # takes a third of a second

    user, moment = new_user(), now() - timedelta(days=2)
    await client.send([served(user, moment), feedback(user, moment, dwell_ms=5)])
    asked = pd.DataFrame(
        {"label": [1, 0], "user_id": [user, "cold"], "as_of": pd.to_datetime([moment + timedelta(seconds=1)] * 2)},
        index=[7, 3],
    )
    found = await client.history(asked)
    assert list(found.columns)[:3] == ["label", "user_id", "as_of"]
    assert list(found.index) == [7, 3]
    assert list(found["tip_volume_30d"]) == [1, 0]
    assert found["mean_dwell_ms_30d"].dtype == "float64"
    assert found["mean_dwell_ms_30d"].isna().tolist() == [False, True]

    texts = await client.history(asked.assign(as_of=[(moment + timedelta(seconds=1)).isoformat()] * 2))
    assert list(texts["tip_volume_30d"]) == [1, 0]  # the times of a file that pandas read

    before = await client.history(asked, known_at=pd.Timestamp(moment))
    assert list(before["tip_volume_30d"]) == [0, 0]

    decision = await client.decide(user, CANDIDATES)
    logged = await client.history(pd.DataFrame({"decision_id": [decision.id]}))
    assert list(logged["tip_volume_30d"]) == [1]


async def test_default_is_not_used_when_the_request_is_invalid(client: Any) -> None:
    with pytest.raises(Invalid):
        await client.profile("a/b", default=None)
    with pytest.raises(Invalid):
        await client.decide("ann", [], default=None)


async def test_fake_computes_what_the_service_computes(service_url: str) -> None:
    random, newest, users = Random(11), now(), [new_user() for _ in range(8)]

    def event(user: str) -> TipServed | TipFeedback:
        zone = timezone(timedelta(minutes=15 * random.randrange(-40, 40)))
        age = timedelta(minutes=random.randrange(1, 45 * 24 * 60))
        at = (newest - age).astimezone(zone).replace(microsecond=1000 * random.randrange(1000))
        if random.random() < 0.3:
            return served(user, at)
        action = random.choice(["completed", "dismissed", "snoozed"])
        return feedback(user, at, action=action, dwell_ms=random.choice([None, random.randrange(90_000)]))

    events = [event(random.choice(users)) for _ in range(600)]
    rows = [(random.choice(users), newest - timedelta(hours=random.randrange(24 * 20))) for _ in range(100)]
    with Profiles(service_url, deadline_s=DEADLINE_S) as real, FakeProfiles() as fake:
        assert real.send(events) == fake.send(events)
        assert real.profiles(users) == fake.profiles(users)
        assert [row.features for row in real.history(rows)] == [row.features for row in fake.history(rows)]
