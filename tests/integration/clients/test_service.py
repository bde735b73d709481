"""The Python client on the real service: keys, contracts, idle connections, decisions that a worker learns from."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from profiles_client import (
    AsyncProfiles,
    Candidate,
    ContractWarning,
    Forbidden,
    Invalid,
    Profiles,
    TipServed,
    Unauthenticated,
)
from tests.support.live import KEYS, Live, new_user
from tests.support.python_client import opened
from tests.support.registry import own_entry, own_registry
from tests.support.site import ServeSite
from tests.support.waiting import eventually_async

BOTH = pytest.mark.parametrize("kind", [Profiles, AsyncProfiles])
IGNORE_CONTRACT = pytest.mark.filterwarnings("ignore::profiles_client.ContractWarning")
DEADLINE_S = 30.0


@BOTH
@IGNORE_CONTRACT
@pytest.mark.asyncio(loop_scope="session")
async def test_key_must_allow_the_call(kind: Any, keyed: Live) -> None:
    user = new_user()
    event = TipServed(user_id=user, tip_id="tip", occurred_at=datetime.now(UTC))
    async with opened(kind(keyed.url, KEYS["stranger"], DEADLINE_S)) as client:
        with pytest.raises(Unauthenticated):
            await client.profile(user)
    async with opened(kind(keyed.url, KEYS["writer"], DEADLINE_S)) as client:
        assert (await client.send(event)).accepted == 1
        with pytest.raises(Forbidden) as caught:
            await client.profile(user)
        assert caught.value.request_id
    async with opened(kind(keyed.url, KEYS["reader"], DEADLINE_S)) as client:
        assert (await client.profile(user)).tip_volume_30d == 1
        with pytest.raises(Forbidden):
            await client.send(event)


@BOTH
@pytest.mark.asyncio(loop_scope="session")
async def test_client_warns_when_the_service_has_other_features(
    kind: Any, serve_site: ServeSite, tmp_path: Path
) -> None:
    async with serve_site(features=own_registry(tmp_path / "own.py", own_entry("tips_seen"))) as site:
        with pytest.warns(ContractWarning, match=r"tip_volume_30d is missing.*tips_seen is new") as caught:
            async with opened(kind(site.url, deadline_s=DEADLINE_S)) as client:
                assert not (await client.profile("ann")).tip_volume_30d
        assert len(caught) == 1


@pytest.mark.slow
@BOTH
@IGNORE_CONTRACT
@pytest.mark.asyncio(loop_scope="session")
async def test_service_closes_idle_connections(kind: Any, serve_site: ServeSite) -> None:
    async with serve_site(head_s=0.2) as site, opened(kind(site.url, deadline_s=DEADLINE_S)) as client:
        for _ in range(3):
            await client.profile("ann")
            reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
            await reader.read()  # until the service closes this connection, after that of the client
            writer.close()
        assert (await client.profile("ann")).tip_volume_30d == 0


@IGNORE_CONTRACT
@pytest.mark.slow
async def test_further_features_are_sent(service_url: str) -> None:
    async with AsyncProfiles(service_url, deadline_s=DEADLINE_S) as profiles:
        with pytest.raises(Invalid) as refused:
            await profiles.decide("ann", [Candidate("t-1", True, 3.5, 2, {"mood": "calm"})])
        assert [issue.path for issue in refused.value.issues] == ["candidates[0].features.mood"]
        with pytest.raises(Invalid) as refused:
            await profiles.decide("ann", [Candidate("t-1", True, 3.5, 2)], context={"weather": "rain"})
        assert [issue.path for issue in refused.value.issues] == ["context.weather"]


@pytest.mark.slow
@IGNORE_CONTRACT
async def test_worker_learns_from_a_reported_decision(service_url: str) -> None:
    async with AsyncProfiles(service_url, deadline_s=DEADLINE_S) as profiles:
        decision = await profiles.decide(new_user(), [Candidate("t-1", True, 3.5, 2), Candidate("t-2", False, 12, 1)])
        await decision.served()
        await decision.completed(dwell_ms=7_200)

    def outcome() -> Any:
        with urllib.request.urlopen(f"{service_url}/decisions/{decision.id}") as answer:
            return json.load(answer)["outcome"]

    async def learned() -> bool:
        return bool((await asyncio.to_thread(outcome))["state"] == "learned")

    await eventually_async(learned)
    found = await asyncio.to_thread(outcome)
    assert (found["action"], found["reward"], found["other_tip"], found["repeated"]) == ("completed", 1.0, 0, 0)
