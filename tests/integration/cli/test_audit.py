"""`profiles audit` checks all users; its exit code says whether a violation is left."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from app.bandit.decisions import ScoringRequest
from app.bandit.model.inputs import Context
from app.bootstrap.service import open_service
from app.profiles.online.cache_protocol import FeatureValue, encode
from app.profiles.ports import Cell
from app.settings import Settings
from app.stores.valkey.cache import ValkeyCache, key
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.cli.conftest import Run, rows_shown
from tests.support.events import served
from tests.support.registry import FEATURES, REGISTRY
from tests.support.score_requests import tip
from tests.support.servers import ask

ODD = "user-6\u200b "
USERS = [*(f"user-{number}" for number in range(6)), ODD]


async def _fill(database: Path, server: EmbeddedServer, untrue: list[str]) -> None:
    """Cache the profiles of all users; those of `untrue` with a wrong value."""
    settings = Settings(features=FEATURES, database=database, cache_url=server.url, cache_timeout_ms=5_000)
    async with open_service(settings, door="command") as service:
        now_ms = service.clock.now_ms()
        await service.ingestor.ingest([served(user, now_ms) for user in USERS])
        await service.consumer.log.mark_consumed(list(range(1, len(USERS) + 1)))
        await service.rebuilder.rebuild(USERS, REGISTRY.full_mask)
        assert isinstance(service.cache, ValkeyCache)
        for user in untrue:
            cell = Cell(user, "tip_volume_30d")
            epoch, _ = await service.cache.read([cell])
            known = REGISTRY.named(cell.feature).fingerprint.encode()
            value = FeatureValue(known, len(USERS), now_ms, now_ms + 60_000, b"77")
            ask(server, "SET", key(epoch, cell), encode(value))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cli.profiles.AUDITED_AT_ONCE", 3)


def test_audit_finds_nothing_when_all_values_are_right(migrated: Run, tmp_path: Path, valkey: EmbeddedServer) -> None:
    asyncio.run(_fill(tmp_path / "var/profiles.db", valkey, []))
    done = migrated("audit", "--json", cache_url=valkey.url)
    assert done.code == 0
    assert done.json["checked"] == done.json["users"]["consistent"] == len(USERS)
    assert (done.json["untrue"], done.json["repaired"]) == ([], 0)


@pytest.mark.slow
def test_violation_is_named_and_then_repaired(migrated: Run, tmp_path: Path, valkey: EmbeddedServer) -> None:
    asyncio.run(_fill(tmp_path / "var/profiles.db", valkey, ["user-1", "user-5"]))
    found = migrated("audit", "--json", cache_url=valkey.url)
    assert found.code == 1
    assert [(item["user_id"], item["feature"], item["held"], item["computed"]) for item in found.json["untrue"]] == [
        ("user-1", "tip_volume_30d", "77", "1"),
        ("user-5", "tip_volume_30d", "77", "1"),
    ]
    only = migrated("audit", "user-2", "user-5", cache_url=valkey.url)
    assert only.code == 1
    rows = rows_shown(only.out)
    assert (rows["checked"], rows["users: consistent"], rows["users: violation"]) == ("2", "1", "1")
    assert "user id user-5, feature tip_volume_30d, fault unexplained, held 77, computed 1, held version 7" in only.out
    assert "please report" in only.err
    repaired = migrated("audit", "--repair", "--json", cache_url=valkey.url)
    assert (repaired.code, repaired.json["repaired"]) == (0, 2)
    after = migrated("audit", "--json", cache_url=valkey.url)
    assert (after.code, after.json["users"]["violation"]) == (0, 0)


@pytest.mark.slow
def test_hidden_characters_of_a_user_id_are_shown(migrated: Run, tmp_path: Path, valkey: EmbeddedServer) -> None:
    asyncio.run(_fill(tmp_path / "var/profiles.db", valkey, [ODD]))
    assert "user-6⟨U+200B⟩⟨U+0020⟩, feature tip_volume_30d" in migrated("audit", cache_url=valkey.url).out
    assert migrated("audit", "--json", cache_url=valkey.url).json["untrue"][0]["user_id"] == ODD


def test_audit_fails_when_nothing_could_be_checked(migrated: Run, tmp_path: Path) -> None:
    async def store() -> None:
        async with open_service(
            Settings(features=FEATURES, database=tmp_path / "var/profiles.db"), door="command"
        ) as service:
            await service.ingestor.ingest([served("ann", service.clock.now_ms())])

    asyncio.run(store())
    done = migrated("audit", "--json")
    assert (done.code, done.json["users"]["unchecked"]) == (1, 1)


async def _decide(database: Path) -> list[str]:
    """Decisions of some users, made with the profiles that the service reads; the ids, oldest first."""
    settings = Settings(features=FEATURES, database=database, shadow=False)
    async with open_service(settings, door="command") as service:
        await service.ingestor.ingest([served(user, service.clock.now_ms()) for user in USERS])
        candidates = (tip("tip", False, 1.0, 1.0),)
        requests = [ScoringRequest(user_id=user, candidates=candidates, context=Context(None)) for user in USERS]
        requests.append(msgspec.structs.replace(requests[0], origin="absent"))
        return [(await service.bandit.scorer.score(request)).id for request in requests]


def test_audit_of_decisions_finds_nothing_when_their_profiles_are_right(migrated: Run, tmp_path: Path) -> None:
    asyncio.run(_decide(tmp_path / "var/profiles.db"))
    done = migrated("audit", "--decisions", "100", "--json")
    assert (done.code, done.json["checked"], done.json["untrue"]) == (0, len(USERS) + 1, [])
    assert {name: count for name, count in done.json["decisions"].items() if count} == {
        "consistent": len(USERS),
        "not read": 1,
    }
    assert done.json["values"]["consistent"] == len(USERS) * len(REGISTRY)
    newest = migrated("audit", "--decisions", "5")
    assert newest.code == 0
    rows = rows_shown(newest.out)
    assert (rows["checked"], rows["decisions: consistent"], rows["decisions: not read"]) == ("5", "4", "1")
    assert rows["values: consistent"] == str(4 * len(REGISTRY))


def test_audit_names_a_decision_whose_profile_is_wrong(migrated: Run, tmp_path: Path) -> None:
    database = tmp_path / "var/profiles.db"
    decision_id = asyncio.run(_decide(database))[1]
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(
            "UPDATE tip_scores SET request = json_set(request, '$.profile.tip_volume_30d', 77) WHERE decision_id = ?",
            (decision_id,),
        )
    found = migrated("audit", "--decisions", "100", "--json")
    assert (found.code, found.json["decisions"]["violation"], found.json["values"]["violation"]) == (1, 1, 1)
    (item,) = found.json["untrue"]
    assert (item["decision_id"], item["user_id"], item["feature"]) == (decision_id, "user-1", "tip_volume_30d")
    assert (item["logged"], item["computed"], item["version"]) == ("77", "1", 2)
    shown = migrated("audit", "--decisions", "100")
    assert f"decision id {decision_id}, feature tip_volume_30d, logged 77, computed 1, version 2" in shown.out


def test_decisions_are_audited_without_users_or_repair(migrated: Run) -> None:
    for arguments in (("ann",), ("--repair",)):
        refused = migrated("audit", "--decisions", "1", *arguments)
        assert refused.code == 2
        assert "allows neither USERS nor --repair" in refused.err


def test_user_is_refused_when_its_id_is_not_allowed(migrated: Run) -> None:
    done = migrated("audit", "a/b")
    assert done.code == 5
    assert "must not contain /" in done.err
