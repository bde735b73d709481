"""`GET /admin/keys`: the configured keys and when each was used last."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.api.auth.authentication import Authenticator
from app.asgi import note_key_uses
from app.errors import StoreUnavailable
from app.settings.parsers import PostgresUrl
from app.stores.sql.access import SqlKeyUses
from tests.support.live import API_KEYS, KEYS, Live, as_caller
from tests.support.site import ServeSite
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.both_engines


async def last_used(site: Live) -> dict[str, str | None]:
    answer = await site.client.get("/admin/keys", headers=as_caller("admin"))
    assert answer.status_code == 200
    return {key["name"]: key["last_used"] for key in answer.json()["keys"]}


async def test_key_is_listed_with_its_last_use(store: Path | PostgresUrl, serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS, database=store) as site:
        before = await last_used(site)
        assert (before["reader"], before["writer"]) == (None, None)
        assert before["admin"] is not None, "this request used it"
        await site.client.get("/profiles/ann", headers=as_caller("reader"))
        after = await last_used(site)
        assert after["reader"] is not None
        assert after["reader"].endswith("Z")
        assert after["writer"] is None
        body = (await site.client.get("/admin/keys", headers=as_caller("admin"))).json()
        assert [key["scopes"] for key in body["keys"]] == [["admin"], ["read"], ["write"]]


async def test_use_in_another_process_is_listed(
    store: Path | PostgresUrl, serve_site: ServeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.asgi.EVERY_S", 0.01)
    async with (
        serve_site(api_keys=API_KEYS, database=store) as one,
        serve_site(api_keys=API_KEYS, database=store) as other,
    ):
        await one.client.get("/profiles/ann", headers=as_caller("reader"))

        async def listed() -> bool:
            return (await last_used(other))["reader"] is not None

        await eventually_async(listed)


async def test_no_key_is_listed_when_none_is_configured(own_site: Live) -> None:
    assert (await own_site.client.get("/admin/keys")).json() == {"keys": []}


async def test_use_is_stored_later_when_the_database_fails(own_site: Live) -> None:
    service, authenticator = own_site.service, Authenticator(API_KEYS)
    authenticator.find(KEYS["reader"])
    uses = SqlKeyUses(service.database)
    await service.database.execute("ALTER TABLE service RENAME TO service_away")
    with pytest.raises(StoreUnavailable):
        await note_key_uses(authenticator, uses, service.clock)
    await service.database.execute("ALTER TABLE service_away RENAME TO service")
    await note_key_uses(authenticator, uses, service.clock)
    assert set(await uses.newest_ms()) == {"reader"}
