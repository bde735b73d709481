"""`FakeProfiles` and sharing: what a program's tests do with the fake, and how reads share requests."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from profiles_client import (
    AsyncProfiles,
    Candidate,
    ConnectionLost,
    FakeAsyncProfiles,
    FakeProfiles,
    FakeService,
    IncompleteHistory,
    Invalid,
    ProfileFeatures,
    Profiles,
    TipServed,
    Unavailable,
)
from profiles_client.wire import Request, Response

CANDIDATE = Candidate("t-1", True, 3.5, 2)


class Recording(FakeService):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.requests: list[Request] = []

    def answer(self, request: Request) -> Response:
        if request.target != "/features":
            self.requests.append(request)
        return super().answer(request)


def test_test_sets_profiles_and_sees_what_was_sent() -> None:
    with FakeProfiles() as profiles:
        profiles.service.profiles["ann"] = ProfileFeatures(completion_rate_30d=0.7, tip_volume_30d=10)
        assert profiles.profile("ann") == ProfileFeatures(completion_rate_30d=0.7, tip_volume_30d=10)
        decision = profiles.decide("ann", [CANDIDATE])
        decision.served()
        assert [event.decision_id for event in profiles.service.events] == [decision.id]
        assert profiles.service.decisions[decision.id].chosen_id == "t-1"


def test_fallback_is_tested_without_waiting() -> None:
    with FakeProfiles(deadline_s=3600) as profiles:
        profiles.service.down = True
        assert profiles.profile("ann", default=None) is None
        assert profiles.profiles(["ann"], default=None) is None
        assert profiles.decide("ann", [CANDIDATE], default=None) is None
        with pytest.raises(Unavailable):
            profiles.profile("ann")
        with pytest.raises(Unavailable):
            profiles.send(TipServed(user_id="ann", tip_id="t", occurred_at=datetime.now(UTC)))
        profiles.service.down = False
        assert profiles.profile("ann", default=None) == profiles.profile("ann")


def test_own_features_are_typed_by_their_contract() -> None:
    class Own(msgspec.Struct, frozen=True):
        snooze_rate: float | None

    service = FakeService(compute=lambda events: {"snooze_rate": len(events) / 2})
    with FakeProfiles(service, contract=Own) as profiles:
        profiles.send(TipServed(user_id="ann", tip_id="t", occurred_at=datetime.now(UTC)))
        assert profiles.profile("ann").snooze_rate == 0.5


async def test_fakes_of_both_kinds_share_a_service() -> None:
    service = FakeService()
    async with FakeAsyncProfiles(service) as profiles:
        await (await profiles.decide("ann", [CANDIDATE])).served()
    with FakeProfiles(service) as blocking:
        assert blocking.profile("ann").tip_volume_30d == 1


def test_client_must_be_open() -> None:
    client = FakeProfiles()
    with pytest.raises(RuntimeError, match="with"):
        client.profile("ann")
    with client:
        client.profile("ann")
    with pytest.raises(RuntimeError, match="with"):
        client.profile("ann")


async def test_client_is_opened_once() -> None:
    with FakeProfiles() as client:
        with pytest.raises(RuntimeError, match="open already"), client:
            pass
        assert client.profile("ann").tip_volume_30d == 0
    async with FakeAsyncProfiles() as other:
        with pytest.raises(RuntimeError, match="open already"):
            async with other:
                pass
        assert (await other.profile("ann")).tip_volume_30d == 0


async def test_reads_of_one_turn_share_a_request() -> None:
    service = Recording()
    service.profiles |= {f"user-{number}": ProfileFeatures(tip_volume_30d=number) for number in range(1_500)}
    async with FakeAsyncProfiles(service) as profiles:
        users = [f"user-{number % 1_500}" for number in range(3_000)]
        found = await asyncio.gather(*map(profiles.profile, users))
    assert [features.tip_volume_30d for features in found] == [number % 1_500 for number in range(3_000)]
    assert [request.method for request in service.requests] == ["POST", "POST"]


async def test_single_read_is_a_get() -> None:
    service = Recording()
    async with FakeAsyncProfiles(service) as profiles:
        await profiles.profile("ann")
        await profiles.profile("bob")
    assert [(request.method, request.target) for request in service.requests] == [
        ("GET", "/profiles/ann"),
        ("GET", "/profiles/bob"),
    ]


async def test_reads_of_two_traces_or_deadlines_do_not_share() -> None:
    service, traces = Recording(), iter([*"ababab", None, None])
    async with FakeAsyncProfiles(service, traceparent=lambda: next(traces, "later")) as profiles:
        await asyncio.gather(*map(profiles.profile, ["u1", "u2", "u3", "u4"]))
        assert len(service.requests) == 2
        await asyncio.gather(profiles.profile("u5"), profiles.profile("u6", deadline_s=9))
    assert len(service.requests) == 4


async def test_invalid_id_spoils_no_other_read() -> None:
    async with FakeAsyncProfiles() as profiles:
        found = await asyncio.gather(*map(profiles.profile, ["ann", "a/b", "bob"]), return_exceptions=True)
    assert [type(item) for item in found] == [ProfileFeatures, Invalid, ProfileFeatures]


async def test_cancelled_read_spoils_no_other_read() -> None:
    async with FakeAsyncProfiles() as profiles:
        reads = [asyncio.create_task(profiles.profile(user)) for user in ("ann", "bob")]
        await asyncio.sleep(0)
        reads[0].cancel()
        assert isinstance(await reads[1], ProfileFeatures)
        with pytest.raises(asyncio.CancelledError):
            await reads[0]


async def test_failure_reaches_every_read_that_shared() -> None:
    async with FakeAsyncProfiles() as profiles:
        profiles.service.down = True
        found = await asyncio.gather(*map(profiles.profile, ["ann", "bob"]), return_exceptions=True)
        assert [type(item) for item in found] == [ConnectionLost, ConnectionLost]
        assert await asyncio.gather(*(profiles.profile(user, default=None) for user in ("ann", "bob"))) == [None, None]


async def test_client_leaves_no_read_behind_when_it_closes() -> None:
    async with FakeAsyncProfiles(traceparent=lambda: None) as profiles:
        reading = asyncio.create_task(profiles.profile("ann"))
        await asyncio.sleep(0)
        reading.cancel()
    assert asyncio.all_tasks() - {asyncio.current_task()} <= {reading}


async def test_read_fails_when_the_client_is_closed_meanwhile() -> None:
    async with FakeAsyncProfiles() as profiles:
        reads = [asyncio.create_task(profiles.profile(user)) for user in ("ann", "bob")]
        await asyncio.sleep(0)
    for read in reads:
        with pytest.raises(ConnectionLost, match="closed"):
            await read


def test_training_set_warns_of_values_that_could_not_be_computed() -> None:
    class Partly(FakeService):
        def answer(self, request: Request) -> Response:
            rows = [{"user_id": "ann", "as_of": datetime.now(UTC), "features": {"tip_volume_30d": None}}]
            return Response(200, {}, msgspec.json.encode({"rows": rows, "failed": {"tip_volume_30d": "too slow"}}))

    with FakeProfiles(Partly(), traceparent=lambda: None) as profiles:
        with pytest.warns(IncompleteHistory, match="tip_volume_30d: too slow"):
            profiles.history([("ann", datetime.now(UTC))])


def test_invalid_row_is_named_when_it_is_in_a_later_request() -> None:
    row = ("ann", datetime.now(UTC))
    with FakeProfiles() as profiles:
        with pytest.raises(Invalid, match=r"rows\[10003\]\.decision_id"):
            profiles.history([*[row] * 10_003, "no-decision"])


def test_fakes_are_clients() -> None:
    assert issubclass(FakeProfiles, Profiles)
    assert issubclass(FakeAsyncProfiles, AsyncProfiles)
