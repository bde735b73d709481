"""The page of a user in a browser: cached and computed values, events, charts, and a cache that fails."""

import re
import signal
from typing import Annotated
from unittest.mock import AsyncMock
from urllib.parse import quote

import pytest
from msgspec import UNSET, Meta, UnsetType
from playwright.async_api import Browser, Locator, expect

from app.features.clock import DAY_MS
from app.features.contract import Contract
from app.features.registry import Registry
from app.features.schema import Int, Str
from app.profiles.ports import EVERY_SLOT
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.api.admin.test_user_inspection import NASTY
from tests.integration.api.admin.test_users import put
from tests.integration.api.test_scoring import score
from tests.support.browser import NARROW, WIDE, Scheme, Visitor, looks, visiting
from tests.support.entries import entry
from tests.support.events import feedback, served
from tests.support.features import ProfileFeatures
from tests.support.live import Live, new_user
from tests.support.registry import REGISTRY
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.site import ServeSite

HTML = {"Accept": "text/html"}
SCRIPTS = ["<script>alert(1)<\\script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "javascript:alert(1)"]


def address(user: str, part: str = "") -> str:
    return f"/admin/users/{quote(user, safe='')}{part}"


def feature(visitor: Visitor, name: str) -> Locator:
    return visitor.page.locator(f"#feature-{name}")


async def lively(site: Live) -> str:
    """A user with a month of events, and all features cached."""
    user, now = new_user(), site.now_ms
    await site.send(
        *(served(user, now - ago * DAY_MS - 5_000) for ago in range(29)),
        *(feedback(user, now - ago * DAY_MS - 4_000, "dismissed", dwell_ms=900) for ago in range(0, 29, 3)),
        *(feedback(user, now - ago * DAY_MS - 4_000, dwell_ms=7_000) for ago in range(1, 29, 3)),
    )
    await site.features(user)
    await site.filled()
    return user


@looks
async def test_page_is_sound_when_there_are_many_events(
    site: Live, browser: Browser, scheme: Scheme, width: int
) -> None:
    user = await lively(site)
    async with visiting(browser, site, scheme=scheme, width=width) as visitor:
        await visitor.go(address(user))
        folded = visitor.page.locator("main > details:not([open]) > summary")
        while await folded.count():
            await folded.first.click()
        assert await visitor.page.locator("table.events tbody tr:visible").count() == (10 if width == WIDE else 6)
        await visitor.page.get_by_text("Show all 49").click()
        await visitor.page.locator("table.events summary").first.click()
        await visitor.assert_sound()
        await expect(visitor.page.get_by_role("heading", level=1)).to_have_text(f"User {user}")
        for known in REGISTRY:
            row = feature(visitor, known.name)
            await expect(row).to_contain_text(known.description)
            await expect(row).to_contain_text("fresh")
            await expect(row).to_contain_text("the same")
            await expect(row).to_contain_text(known.invalidated_by[0])
            left = row.get_by_role("meter")
            share = float(await left.get_attribute("value") or 0) / known.ttl.total_seconds()
            assert 0.85 < share <= 1
        assert await visitor.page.locator("figure svg").count() == 4 + len(REGISTRY)
        assert await visitor.page.locator("table.events tbody tr:visible").count() == 49


async def test_page_is_short_on_a_telephone(site: Live, browser: Browser) -> None:
    user = await lively(site)
    for _ in range(5):
        await score(site, user_id=user)
    async with visiting(browser, site, width=NARROW) as visitor:
        await visitor.go(address(user))
        assert await visitor.page.locator("table.decisions tbody tr").count() == 3
        assert await visitor.page.evaluate("document.documentElement.scrollHeight") < 4_000


async def test_newest_decisions_link_to_all_decisions_of_the_user(site: Live, browser: Browser) -> None:
    user = new_user()
    made = [(await score(site, user_id=user))["decision_id"] for _ in range(4)]
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        links = visitor.page.locator("table.decisions .when a")
        addresses = [await link.get_attribute("href") for link in await links.all()]
        assert addresses == [f"/admin/decisions/{decision_id}" for decision_id in reversed(made[1:])]
        await visitor.assert_sound()
        await visitor.page.get_by_role("link", name="All decisions of this user").click()
        await expect(visitor.page.locator("tbody tr")).to_have_count(4)


async def test_times_are_shown_in_the_zone_of_the_browser(site: Live, browser: Browser) -> None:
    user = await lively(site)
    async with visiting(browser, site, zone="Asia/Kolkata") as visitor:
        await visitor.go(address(user))
        shown = await visitor.page.locator("footer time").inner_text()
        (utc, here) = re.findall(r"(\d+):(\d\d):\d\d", shown)
        assert (int(here[1]) - int(utc[1])) % 60 == 30
        assert shown.endswith(" here)")
        assert " here" in (await visitor.page.locator("td.when time").first.get_attribute("title") or "")
        await visitor.assert_sound()


async def test_charts_equal_the_tables(site: Live, browser: Browser) -> None:
    user = await lively(site)
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        drawn = visitor.page.get_by_role("img", name="Tips served, by day.")
        await expect(drawn).to_have_accessible_name(re.compile("latest 1, lowest 0, highest 1"))
        await visitor.page.get_by_text("The same as tables").click()
        table = visitor.page.get_by_role("table", name="By day", exact=True)
        assert await table.locator("tbody tr").count() == 30
        cells = await table.locator("tbody tr td:nth-child(2)").all_inner_texts()
        assert sum(map(int, cells)) == 29 == (await site.features(user))["tip_volume_30d"]
        volume = visitor.page.get_by_role("img", name="tip_volume_30d.")
        await expect(volume).to_have_accessible_name(re.compile("latest 29, lowest 0, highest 29"))
        await visitor.page.get_by_text("The same as a table").click()
        table = visitor.page.get_by_role("table", name="Features by day")
        last = dict(
            zip(
                await table.locator("thead th").all_inner_texts(),
                await table.locator("tbody tr").last.locator("th, td").all_inner_texts(),
                strict=True,
            )
        )
        assert await table.locator("tbody tr").count() == 30
        assert last["tip_volume_30d"] == "29"


async def test_page_fills_no_cache(site: Live, browser: Browser, cache_server: EmbeddedServer) -> None:
    user = new_user()
    await site.send(served(user, site.now_ms))
    async with visiting(browser, site) as visitor:
        for _ in range(2):
            await visitor.go(address(user))
            await expect(feature(visitor, "tip_volume_30d")).to_contain_text("missing")
            await expect(feature(visitor, "tip_volume_30d")).to_contain_text("the next read computes it")
    await site.filled()
    assert ask(cache_server, "KEYS", f"pf:*:{{{user}}}:*") == []


async def test_page_warns_when_a_cached_value_is_wrong(
    site: Live, browser: Browser, cache_server: EmbeddedServer
) -> None:
    user = new_user()
    await site.send(
        served(user, site.now_ms - 30 * DAY_MS + 700), served(user, site.now_ms), feedback(user, site.now_ms)
    )
    (newest, *_) = (await site.client.get(address(user))).json()["events"]
    await site.filled()
    await put(site, cache_server, user, "preferred_hour", seq=newest["seq"])
    await put(site, cache_server, user, "completion_rate_30d", seq=0)
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        alerts = visitor.page.get_by_role("alert")
        await expect(alerts).to_have_count(2)
        await expect(alerts.filter(has_text="Stale:")).to_contain_text("completion_rate_30d")
        await expect(alerts.filter(has_text="Wrong cached value:")).to_contain_text("preferred_hour")
        await expect(feature(visitor, "completion_rate_30d")).to_contain_text("differs: event")
        await expect(feature(visitor, "preferred_hour")).to_contain_text("differs: unexplained")
        await visitor.assert_sound()


async def test_page_is_sound_when_the_user_is_unknown(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go(address(new_user()))
        assert "No event of this user is stored." in await visitor.text()
        await expect(feature(visitor, "tip_volume_30d")).to_contain_text("0")
        await visitor.assert_sound()


@pytest.mark.parametrize("nasty", [*NASTY[:4], *SCRIPTS])
async def test_page_shows_ids_as_text(site: Live, browser: Browser, nasty: str) -> None:
    user = new_user(nasty)
    await site.send(feedback(user, site.now_ms, tip_id=nasty, decision_id=nasty, event_id=user))
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        await expect(visitor.page.locator("h1 .id")).to_have_text(user)
        await expect(visitor.page.locator("table.events td.tip")).to_have_text(nasty)
        assert await visitor.page.title() == f"{user} · Profiles"
        await visitor.page.get_by_role("link", name="Erase this user").click()
        await expect(visitor.page.locator("h1 .id")).to_have_text(user)
        await visitor.page.get_by_role("link", name="Cancel").click()
        await visitor.page.get_by_role("button", name="Rebuild all").click()
        await expect(visitor.page.get_by_role("heading", level=1)).to_have_text(f"Rebuilt {user}")
        await visitor.page.get_by_role("link", name="Back to the user").click()
        await expect(visitor.page.locator("h1")).to_have_text(f"User {user}")
        await visitor.assert_sound()


async def test_events_show_their_state(own_site: Live, browser: Browser) -> None:
    site, user = own_site, new_user()
    await site.send(served(user, site.now_ms - 60_000), feedback(user, site.now_ms + 200_000, "snoozed", dwell_ms=0))
    first, second = (item.seq for item in await site.service.consumer.log.unconsumed(site.now_ms + 1, 10))
    await site.service.dead_letters.failed(first, "it failed", "Traceback", site.now_ms, 1)
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        rows = visitor.page.locator("table.events tbody tr")
        await expect(rows.nth(0)).to_contain_text(str(second))
        for said in ("snoozed", "time corrected", "early", "waiting", "4 features", "0 ms"):
            await expect(rows.nth(0)).to_contain_text(said)
        for said in ("served", "1 min", "dead letter", "1 feature"):
            await expect(rows.nth(1)).to_contain_text(said)
        await visitor.page.get_by_role("columnheader", name="No.").get_by_role("button").click()
        await expect(rows.nth(0)).to_contain_text(str(first))


async def test_page_is_sound_when_the_cache_hangs(
    serve_site: ServeSite, start_server: StartServer, browser: Browser
) -> None:
    cache = start_server(VALKEY)
    async with serve_site(cache_url=cache.url, cache_timeout_ms=100) as site:
        user = await lively(site)
        async with visiting(browser, site) as visitor:
            cache.signal(signal.SIGSTOP)
            try:
                await visitor.go(address(user))
                assert "The cache does not answer." in await visitor.text()
                await expect(feature(visitor, "tip_volume_30d")).to_contain_text("degraded")
                await expect(feature(visitor, "tip_volume_30d")).to_contain_text("29")
                await visitor.assert_sound()
                await visitor.page.get_by_role("button", name="Rebuild all").click()
                await expect(visitor.page.get_by_role("status")).to_contain_text("Computed, but not cached")
            finally:
                cache.signal(signal.SIGCONT)


async def test_page_explains_that_the_cache_is_not_trusted(own_site: Live, browser: Browser) -> None:
    user = await lively(own_site)
    # As if another process owed an invalidation that is not settled yet.
    own_site.service.inspector.distrusted = AsyncMock(return_value=frozenset([EVERY_SLOT]))
    async with visiting(browser, own_site) as visitor:
        await visitor.go(address(user))
        assert "The cache is not trusted" in await visitor.text()
        await expect(feature(visitor, "tip_volume_30d")).to_contain_text("cached, but not served")
        await visitor.assert_sound()


class Extended(ProfileFeatures, kw_only=True, frozen=True):
    """`mood` is a text; the SQL of `broken` gives a text although it is declared an int."""

    mood: Annotated[Str | UnsetType, Meta(description="A feature of the tests.")] = UNSET
    broken: Annotated[Int | UnsetType, Meta(description="A feature of the tests.")] = UNSET


async def test_texts_are_listed_and_failures_shown(serve_site: ServeSite, browser: Browser) -> None:
    latest = "SELECT user_id, MAX(action) AS value FROM feedback GROUP BY user_id"
    added = (entry(name="mood", dtype="str", compute=latest), entry(name="broken", compute=latest))
    async with serve_site(contract=Contract(registry=Registry([*REGISTRY, *added]), mirror=Extended)) as site:
        user, now = new_user(), site.now_ms
        await site.send(feedback(user, now - 9 * DAY_MS), feedback(user, now - 2 * DAY_MS, "snoozed"))
        async with visiting(browser, site) as visitor:
            await visitor.go(address(user))
            await expect(visitor.page.get_by_role("alert")).to_contain_text("the SQL gave text where int is declared")
            await expect(feature(visitor, "broken")).to_contain_text("failed")
            course = await visitor.page.locator("ol.course li").all_inner_texts()
            assert [line.rpartition(": ")[2] for line in course] == ["null", "completed", "snoozed"]
            await visitor.assert_sound()


async def test_disabled_feature_is_shown_with_its_reason(own_site: Live, browser: Browser) -> None:
    user = await lively(own_site)
    await own_site.client.post("/admin/features/tip_volume_30d/disable", json={"reason": "INC-12"})
    cell = (await own_site.client.get(address(user))).json()["features"]["tip_volume_30d"]
    assert (cell["value"], cell["held"]["value"], cell["difference"], cell["disabled"]) == (None, 29, None, True)
    assert cell["error"].endswith(": INC-12")
    place = REGISTRY.names.index("tip_volume_30d")
    assert (await own_site.service.inspector.inspect([user]))[0].reading(place).json == b"null"
    async with visiting(browser, own_site) as visitor:
        await visitor.go(address(user))
        await expect(visitor.page.get_by_role("status")).to_contain_text("Disabled: tip_volume_30d.")
        assert await visitor.page.get_by_role("alert").count() == 0
        row = feature(visitor, "tip_volume_30d")
        for said in ("disabled", "cached, but reads return null", "not computed", "INC-12"):
            await expect(row).to_contain_text(said)
        await expect(row).not_to_contain_text("differs")
        await expect(feature(visitor, "preferred_hour")).to_contain_text("the same")
        await visitor.assert_sound()
        await row.get_by_role("button", name="Rebuild").click()
        await expect(visitor.page.get_by_role("alert")).to_contain_text("tip_volume_30d was not computed: disabled by")
        assert await visitor.page.get_by_role("status").count() == 0
        await visitor.assert_sound()


async def test_page_works_when_there_is_no_javascript(site: Live, browser: Browser) -> None:
    user = await lively(site)
    async with visiting(browser, site, scripts=False) as visitor:
        await visitor.go(address(user))
        await feature(visitor, "preferred_hour").get_by_role("button").click()
        await expect(visitor.page.locator("tbody tr")).to_have_count(1)
        await visitor.page.get_by_role("link", name="Back to the user").click()
        await visitor.page.get_by_text("The same as tables").click()
        await expect(visitor.page.get_by_role("table", name="By day", exact=True)).to_be_visible()


async def test_browser_is_redirected_from_the_timeline_to_the_page(site: Live) -> None:
    answer = await site.client.get(address("a?b", "/development"), headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, "/admin/users/a%3Fb#activity")


async def test_error_is_a_page_when_the_id_is_not_allowed(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin/users/" + "x" * 129, status=422)
        assert "at most 128 characters" in await visitor.text()
        await visitor.assert_sound()
