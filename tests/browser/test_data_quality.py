"""The pages of data quality: the report, its refresh, and the users of each state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, Route, expect

from app.features.clock import DAY_MS
from app.stores.queue.client import HEALTH_KEY
from app.stores.valkey.embedded import EmbeddedServer
from tests.integration.api.admin.test_users import put
from tests.support.browser import Scheme, looks, visiting
from tests.support.events import served
from tests.support.live import KEYS, Live, new_user
from tests.support.registry import REGISTRY, own_entry, own_registry
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.site import ServeSite

PATH = "/admin/data-quality"
HOSTILE = "<img src=x onerror=alert(1)>&\"' 🎯"


async def newest(site: Live) -> int:
    return (await site.service.quality.runs.newest(1))[0].id


async def measured(site: Live) -> None:
    run, _ = await site.service.quality.runs.open("ann", site.now_ms)
    await site.service.quality.carry_out(run.id, 60)


async def populated(site: Live, cache_server: EmbeddedServer, count: int = 120) -> list[str]:
    """Users with events for 38 days, more now than before; some cached, one stale. Returns the ids in order."""
    users = sorted([HOSTILE, *(new_user() for _ in range(count - 1))])
    events = [served(user, site.now_ms - days * DAY_MS) for user in users for days in (1, 9, 20, 36, 38)]
    events += [served(user, site.now_ms - 2 * DAY_MS) for user in users[: count * 2 // 3]]
    await site.send(*events)
    for user in users[:5]:
        await site.service.reader.read({user: REGISTRY.full_mask})
    await site.filled()
    await put(site, cache_server, users[9], "tip_volume_30d", seq=0)
    return users


async def test_report_is_requested_when_there_is_none(own_site: Live, browser: Browser) -> None:
    await own_site.send(served(new_user(), own_site.now_ms))
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        assert "No report has been stored yet." in await visitor.text()
        assert "No worker is running" in await visitor.text()
        await visitor.assert_sound()
        await visitor.go(PATH)  # another visit asks for no other
        run = await newest(own_site)
        assert len(await own_site.service.quality.runs.newest(9)) == 1
        await own_site.service.quality.carry_out(run, 60)
        await expect(visitor.page.get_by_text("Eligible 7 days before")).to_be_visible()  # the page came anew by itself
        await visitor.assert_sound()


@looks
async def test_report_is_a_sound_page(
    own_site: Live, cache_server: EmbeddedServer, browser: Browser, scheme: Scheme, width: int
) -> None:
    await populated(own_site, cache_server)
    await measured(own_site)
    async with visiting(browser, own_site, scheme=scheme, width=width) as visitor:
        await visitor.go(PATH)
        for summary in await visitor.page.locator("summary").all():
            await summary.click()
        await visitor.assert_sound()
        await visitor.go(f"{PATH}/users?feature=tip_volume_30d&state=fresh")
        assert HOSTILE in await visitor.text()
        await visitor.assert_sound()
        await visitor.go(f"{PATH}/users")
        await visitor.assert_sound()


async def test_report_shows_its_figures_and_histograms(
    own_site: Live, cache_server: EmbeddedServer, browser: Browser
) -> None:
    await populated(own_site, cache_server)
    await measured(own_site)
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        page = visitor.page
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name="tip_volume_30d", exact=True))
        cells = [cell.split("\n")[0].strip() for cell in await row.get_by_role("cell").all_inner_texts()]
        assert cells[1:4] == ["120", "5", "114"]
        assert cells[4] == "1 fault"
        assert "major drift" in cells[10]
        await expect(page.locator("svg.chart")).to_have_count(len(REGISTRY))
        card = page.locator("#tip_volume_30d")
        bars = await card.locator("svg.chart rect:has(title)").all()
        assert len(bars) >= 4
        fills = {await bar.evaluate("e => getComputedStyle(e).fill") for bar in bars}
        assert len(fills) == 2  # each population in its own colour
        spoken = re.compile(r"^tip_volume_30d.* most have 4 \(67%\), 7 days before most have 3 \(100%\)")
        await expect(card.locator("svg.chart")).to_have_accessible_name(spoken)
        await expect(page.locator("p.lead")).to_have_text(re.compile(r"^Measured (just now|\d.* s ago) in \d"))


async def test_sampling_error_is_shown_when_users_were_drawn(
    own_site: Live, cache_server: EmbeddedServer, browser: Browser
) -> None:
    await populated(own_site, cache_server)
    own_site.service.quality.sample = 60
    await measured(own_site)
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        text = await visitor.text()
        assert "from 60 users drawn at random" in text
        assert re.search(r"within \d+\.\d percentage points of the share among all", text)
        row = visitor.page.get_by_role("row").filter(
            has=visitor.page.get_by_role("link", name="tip_volume_30d", exact=True)
        )
        cells = await row.get_by_role("cell").all_inner_texts()
        assert cells[1].strip() == "60"
        assert re.search(r"\d\n?\s*\d+\.\d\d–\d+\.\d\d\s%", cells[3]), cells[3]
        await visitor.assert_sound()


async def test_count_links_to_its_users_page_by_page(
    own_site: Live, cache_server: EmbeddedServer, browser: Browser
) -> None:
    users = await populated(own_site, cache_server)
    await measured(own_site)
    async with visiting(browser, own_site) as visitor:
        page = visitor.page
        await visitor.go(PATH)
        await page.get_by_role("link", name="114 users whose tip_volume_30d is missing").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Users whose tip_volume_30d is missing")
        missing = [*users[5:9], *users[10:]]
        ids = page.locator("tbody a.id")
        await expect(ids).to_have_text(missing[:50])
        await page.get_by_role("link", name="Continue after").click()
        await expect(ids).to_have_text(missing[50:100])
        await page.get_by_role("link", name="Continue after").click()
        await expect(ids).to_have_text(missing[100:])
        await expect(page.get_by_role("link", name="Continue after")).to_have_count(0)
        await page.get_by_label("State").select_option("stale")
        await page.get_by_role("button", name="List").click()
        await expect(ids).to_have_text([users[9]])
        await page.get_by_label("State").select_option("null")
        await page.get_by_role("button", name="List").click()
        await expect(page.get_by_text("No eligible user is in this state.")).to_be_visible()


@pytest.mark.parametrize("scripts", [True, False])
async def test_report_is_refreshed_by_the_button(
    own_site: Live, browser: Browser, queue_server: EmbeddedServer, scripts: bool
) -> None:
    await own_site.send(served(new_user(), own_site.now_ms))
    await measured(own_site)
    await own_site.send(served(new_user(), own_site.now_ms))
    ask(queue_server, "SET", HEALTH_KEY, "alive", "EX", "60")
    try:
        async with visiting(browser, own_site, scripts=scripts) as visitor:
            page = visitor.page
            await visitor.go(PATH)
            await expect(page.locator(".tile .figure").first).to_have_text("1")
            await page.get_by_role("button", name="Refresh").click()
            await expect(page.get_by_role("status").first).to_contain_text("A worker is measuring")
            assert await page.get_by_role("button", name="Refresh").count() == 0
            if scripts:  # axe is one
                await visitor.assert_accessible()
            run = await newest(own_site)
            await own_site.service.quality.carry_out(run, 60)
            if not scripts:
                await page.get_by_role("link", name="Reload").click()
            await expect(page.locator(".tile .figure").first).to_have_text("2")
    finally:
        ask(queue_server, "DEL", HEALTH_KEY)


async def test_refresh_warns_when_the_queue_is_down(
    serve_site: ServeSite, start_server: StartServer, browser: Browser
) -> None:
    queue = start_server(VALKEY)
    async with serve_site(queue_url=queue.url) as site, visiting(browser, site) as visitor:
        await measured(site)
        await visitor.go(PATH)
        queue.kill()
        await visitor.page.get_by_role("button", name="Refresh").click()
        await expect(visitor.page.get_by_role("status").first).to_contain_text("The queue does not answer")
        await expect(visitor.page.locator("[data-waiting]")).to_contain_text("The queue does not answer")


async def test_failure_of_the_last_measurement_is_shown(own_site: Live, browser: Browser) -> None:
    await measured(own_site)
    run, _ = await own_site.service.quality.runs.open("ann", own_site.now_ms)
    await own_site.service.quality.runs.finish(run.id, "failed", own_site.now_ms, error=f"the job failed: {HOSTILE}")
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        await expect(visitor.page.get_by_role("alert")).to_contain_text(HOSTILE)
        await expect(visitor.page.get_by_role("button", name="Refresh")).to_be_visible()
        await visitor.assert_sound()


async def test_distributions_are_shown_when_the_cache_is_down(
    serve_site: ServeSite, start_server: StartServer, browser: Browser
) -> None:
    cache = start_server(VALKEY)
    async with serve_site(cache_url=cache.url, cache_timeout_ms=100) as site, visiting(browser, site) as visitor:
        await site.send(served(new_user(), site.now_ms))
        cache.kill()
        await measured(site)
        await visitor.go(PATH)
        assert "The cache did not answer during this measurement" in await visitor.text()
        row = visitor.page.get_by_role("row").filter(has_text="tip_volume_30d")
        assert [text.strip() for text in (await row.get_by_role("cell").all_inner_texts())[1:5]] == ["1", "–", "–", "–"]
        await expect(visitor.page.locator("#tip_volume_30d svg.chart")).to_be_visible()
        await visitor.assert_sound()
        await visitor.go(f"{PATH}/users?feature=tip_volume_30d&state=missing")
        assert "The cache does not answer" in await visitor.text()
        await visitor.assert_sound()


async def test_failed_features_have_no_drift(serve_site: ServeSite, browser: Browser, tmp_path: Path) -> None:
    text = "SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id"
    source = own_registry(
        tmp_path / "features.py", own_entry("seen", days=90), own_entry("off"), own_entry("bad", text, days=90)
    )
    async with serve_site(features=source) as site, visiting(browser, site) as visitor:
        await site.send(served(new_user(), site.now_ms), served(new_user(), site.now_ms - 60 * DAY_MS))
        await site.client.post("/admin/features/off/disable", json={"reason": "INC-12"})
        await measured(site)
        report = (await site.client.get(f"{PATH}?max_age_s=60")).json()
        drift = {name: found["drift"] for name, found in report["features"].items()}
        assert (report["eligible"], drift["seen"]["band"]) == (2, None)
        for name, why in (("bad", "the SQL gave text where int is declared"), ("off", "disabled by anyone at ")):
            assert (drift[name]["band"], drift[name]["psi"], drift[name]["failed"]) == ("failed", None, 3)
            assert drift[name]["why_not"].startswith(f"3 values could not be computed: {why}")
        await visitor.go(PATH)
        for name in ("bad", "off"):
            alert = visitor.page.get_by_role("alert").filter(has_text=f"{name} failed:")
            await expect(alert).to_contain_text(drift[name]["why_not"])
            row = visitor.page.get_by_role("row").filter(has=visitor.page.get_by_role("link", name=name, exact=True))
            await expect(row.get_by_role("cell").last).to_have_text("failed 3 values")
            card = visitor.page.locator(f"#{name}")
            await expect(card).to_contain_text(drift[name]["why_not"])
            await expect(card.get_by_role("link")).to_have_attribute("href", f"/admin/features#{name}")
        assert "PSI 0" not in await visitor.text()
        assert "at most 90 d before the measurement began" in await visitor.text()
        assert "30 d" not in await visitor.text()
        await visitor.assert_sound()
        await visitor.go("/admin/rebuilds")
        assert "any event in the last 90 d" in await visitor.text()


async def test_report_is_requested_when_the_stored_one_is_of_another_release(own_site: Live, browser: Browser) -> None:
    runs, ended_ms = own_site.service.quality.runs, own_site.now_ms - 3_600_000
    run, _ = await runs.open("ann", ended_ms)
    await runs.finish(run.id, "completed", ended_ms, body='{"of": "another"}')
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        assert "another release and cannot be read. A new one is requested." in await visitor.text()
        again = await newest(own_site)
        assert again != run.id
        await runs.finish(again, "completed", own_site.now_ms, body='{"of": "another"}')
        await expect(visitor.page.get_by_role("button", name="Refresh")).to_be_visible()  # the page is loaded again
        assert await newest(own_site) == again
        assert "A new one is requested" not in await visitor.text()


async def test_measurement_took_no_negative_time_when_clocks_differ(own_site: Live, browser: Browser) -> None:
    runs = own_site.service.quality.runs
    run, _ = await runs.open("ann", own_site.now_ms)
    await runs.begin(run.id, own_site.now_ms + 3_600_000)
    await runs.finish(run.id, "failed", own_site.now_ms, error="a test")
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        await expect(visitor.page.locator("td[data-label=Took]")).to_have_text("0 ms")


async def test_failed_measurement_is_not_requested_again_by_the_page(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go(PATH)
        run = await newest(own_site)
        await own_site.service.quality.runs.finish(run, "failed", own_site.now_ms, error="the disk is full")
        await expect(visitor.page.get_by_role("alert")).to_contain_text("the disk is full")
        assert "No report has been stored yet." in await visitor.text()
        assert await newest(own_site) == run


async def test_page_leads_to_sign_in_when_the_session_ends_during_a_measurement(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await keyed.service.quality.runs.open("ann", keyed.now_ms)
        await visitor.go(PATH)
        await expect(visitor.page.locator("[data-watch]")).to_be_visible()
        await visitor.context.clear_cookies()
        await expect(visitor.page.get_by_label("API key")).to_be_visible()


async def test_page_continues_when_an_answer_is_no_json(own_site: Live, browser: Browser) -> None:
    broken = iter(["<html>"])

    async def break_first(route: Route) -> None:
        body = next(broken, None)
        await (route.continue_() if body is None else route.fulfill(body=body))

    async with visiting(browser, own_site) as visitor:
        await visitor.page.route(f"**{PATH}/refresh", break_first)
        await visitor.go(PATH)
        await own_site.service.quality.carry_out(await newest(own_site), 60)
        await expect(visitor.page.get_by_text("Eligible 7 days before")).to_be_visible()
        assert next(broken, None) is None


async def test_unknown_state_is_an_error_page(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go(f"{PATH}/users?feature=tip_volume_30d&state=rotten", status=400)
        assert "must be fresh, missing, stale or null" in await visitor.text()
        await visitor.assert_sound()
