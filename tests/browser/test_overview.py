"""The overview in a browser: states, figures, refresh, and use without JavaScript."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from app.bootstrap.health import sampler
from app.stores.queue.client import HEALTH_KEY
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.browser import Scheme, Visitor, looks, visiting
from tests.support.live import KEYS, Live
from tests.support.samples import hour, sample
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.site import ServeSite
from tests.support.waiting import eventually_async

WELL = "Everything works."
BEAT_MS = 10_000


@pytest.fixture(scope="module")
def cache(start_server: StartServer) -> EmbeddedServer:
    return start_server(VALKEY)


@pytest.fixture(scope="module")
def queue(start_server: StartServer) -> EmbeddedServer:
    server = start_server(VALKEY)
    ask(server, "SET", HEALTH_KEY, "alive")
    return server


@pytest_asyncio.fixture(loop_scope="session")
async def well(serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer) -> AsyncIterator[Live]:
    """A site without findings, with samples of an hour, except for ten minutes."""
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        for sample in hour(site.now_ms, gap=range(120, 140)):
            await site.service.samples.keep(sample)
        yield site


async def bury(site: Live) -> None:
    await site.service.dead_letters.bury_payloads([("1", "no event")], site.now_ms)


async def see(visitor: Visitor) -> None:
    """Open the overview again until the service could ask every component in time."""

    async def asked() -> bool:
        await visitor.go("/admin")
        return "could not be asked" not in await visitor.page.locator("#verdict").inner_text()

    await eventually_async(asked)


async def beat(visitor: Visitor) -> None:
    await visitor.page.clock.run_for(BEAT_MS + 100)


@looks
async def test_overview_is_a_sound_page(well: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    async with visiting(browser, well, scheme=scheme, width=width) as visitor:
        await see(visitor)
        await expect(visitor.page.locator("#verdict")).to_contain_text(WELL)
        await visitor.page.locator("summary", has_text="What the figures mean").click()
        await visitor.assert_sound()
        await bury(well)
        await see(visitor)
        await expect(visitor.page.locator("#verdict")).to_contain_text("1 finding needs attention")
        await visitor.assert_sound()


async def test_states_have_a_start_and_figures_a_bar_per_minute(well: Live, browser: Browser) -> None:
    async with visiting(browser, well) as visitor:
        await visitor.go("/admin")
        states = visitor.page.locator(".states li")
        await expect(states).to_have_count(6)
        for state in await states.all():
            await expect(state).to_contain_text("ok")
            await expect(state).to_contain_text("min ago")
        await expect(states.nth(0)).to_contain_text("2 API processes")
        await expect(states.nth(3)).to_contain_text("1 worker process")
        requests = visitor.page.locator(".figures li", has_text="Requests").first
        await expect(requests).to_contain_text("/s")
        bars = await requests.locator("svg rect").count()
        assert 55 <= bars <= 58  # of sixty minutes, two or three are a gap
        await expect(requests.locator("svg rect title").first).to_contain_text(" UTC: ")
        await expect(requests.get_by_role("img")).to_have_accessible_name(
            re.compile(r"^Requests: latest [\d.]+ /s, highest [\d.]+ /s$")
        )


async def test_overview_names_the_registry_of_each_process(well: Live, browser: Browser) -> None:
    await sampler(well.service, "api").sample()
    own = well.service.registry.fingerprint
    async with visiting(browser, well) as visitor:
        await visitor.go("/admin")
        row = visitor.page.get_by_role("row").filter(has_text=well.service.process)
        await expect(row).to_contain_text(own)
        await well.service.samples.keep(sample(at_ms=well.now_ms, process="new", role="worker", registry="0ther"))
        await visitor.go("/admin")
        finding = visitor.page.locator(".findings li", has_text="different registries")
        await expect(finding).to_contain_text(f"0ther by worker new; {own} by API process {well.service.process}")
        await expect(finding.get_by_role("link", name="Features")).to_have_attribute("href", "/admin/features")
        await visitor.assert_sound()


async def test_overview_is_sound_when_there_is_no_sample(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin")
        await expect(visitor.page.locator("#overview")).to_contain_text("no samples")
        await visitor.assert_sound()


async def test_page_refreshes_and_keeps_the_focus(well: Live, browser: Browser) -> None:
    async with visiting(browser, well) as visitor:
        await visitor.page.clock.install()
        await visitor.go("/admin")
        await expect(visitor.page.locator("#announcement")).to_be_empty()
        await visitor.page.locator("summary", has_text="What the figures mean").click()
        letters = visitor.page.locator(".figures").get_by_role("link", name="Dead letters")
        await letters.focus()
        before = await visitor.page.title()
        await bury(well)
        await beat(visitor)
        await expect(visitor.page.locator("#verdict")).to_contain_text("1 finding needs attention")
        await expect(visitor.page.locator("#announcement")).to_contain_text("1 finding needs attention")
        await expect(visitor.page.locator("#meanings")).to_have_attribute("open", "")
        assert await visitor.page.title() != before
        await expect(letters).to_be_focused()
        await visitor.assert_sound()


async def test_page_does_not_refresh_while_paused_or_hidden(well: Live, browser: Browser) -> None:
    async with visiting(browser, well) as visitor:
        await visitor.page.clock.install()
        await visitor.go("/admin")
        asked: list[str] = []
        visitor.page.on("request", lambda request: asked.append(request.url))
        await visitor.page.get_by_role("button", name="Pause").click()
        await beat(visitor)
        assert asked == []
        await visitor.page.get_by_role("button", name="Resume").click()
        await expect(visitor.page.get_by_role("button", name="Pause")).to_be_visible()
        await beat(visitor)
        assert asked
        asked.clear()
        await visitor.page.evaluate("Object.defineProperty(document, 'hidden', { get: () => true })")
        await beat(visitor)
        await beat(visitor)
        assert asked == []


async def test_page_shows_its_age_when_it_cannot_refresh(well: Live, browser: Browser) -> None:
    async with visiting(browser, well) as visitor:
        await visitor.page.clock.install()
        await visitor.go("/admin")
        await visitor.context.set_offline(True)
        await beat(visitor)
        await expect(visitor.page.locator("#freshness")).to_contain_text("Could not refresh")
        await expect(visitor.page.locator("#verdict")).to_contain_text(WELL)
        await visitor.context.set_offline(False)
        await beat(visitor)
        await expect(visitor.page.locator("#freshness")).to_contain_text("As of")


async def test_page_leads_to_sign_in_when_the_session_ends(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.page.clock.install()
        await visitor.sign_in(KEYS["admin"])
        await expect(visitor.page.locator("#verdict")).to_be_visible()
        await visitor.context.clear_cookies()
        await beat(visitor)
        await visitor.page.wait_for_url("**/admin/sign-in?**")


async def test_overview_can_be_used_when_there_is_no_javascript(well: Live, browser: Browser) -> None:
    async with visiting(browser, well, scripts=False) as visitor:
        await visitor.go("/admin")
        await expect(visitor.page.locator("#verdict")).to_contain_text(WELL)
        await bury(well)
        await visitor.page.get_by_role("link", name="Refresh").click()
        await expect(visitor.page.locator("#verdict")).to_contain_text("1 finding needs attention")
        findings = visitor.page.get_by_role("list", name="Findings")
        link = findings.get_by_role("link", name="Dead letters")
        await expect(link).to_have_attribute("href", "/admin/dead-letters")


async def test_page_shows_that_cache_and_queue_are_down(
    serve_site: ServeSite, start_server: StartServer, browser: Browser
) -> None:
    cache, queue = start_server(VALKEY), start_server(VALKEY)
    async with serve_site(cache_url=cache.url, queue_url=queue.url, cache_timeout_ms=100) as site:
        cache.kill()
        queue.kill()
        await sampler(site.service, "api").sample()
        async with visiting(browser, site) as visitor:
            visitor.page.set_default_timeout(5_000)
            await see(visitor)
            await expect(visitor.page.locator("#verdict")).to_contain_text("2 findings need attention")
            findings = visitor.page.get_by_role("list", name="Findings")
            await expect(findings).to_contain_text("The cache is down")
            await expect(findings).to_contain_text("The queue is down")
            await expect(visitor.page.locator(".states li").nth(3)).to_contain_text("unknown")
            await visitor.assert_sound()


async def test_figures_of_the_last_days_are_shown(own_site: Live, browser: Browser) -> None:
    site = own_site
    for days in range(29, 1, -1):
        for later_ms in (0, 3_600_000):  # the second ends the period of the first
            at_ms = site.now_ms - days * 86_400_000 + later_ms
            await site.service.samples.keep(sample(at_ms=at_ms, counts={"shed": 3}))
    await site.service.samples.keep(sample(at_ms=site.now_ms))
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin")
        await visitor.page.get_by_role("link", name="Last 30 days").click()
        await expect(visitor.page.get_by_text("each bar is half a day of the last 30 days")).to_be_visible()
        assert await visitor.page.get_by_role("img", name=re.compile("Shed requests")).locator("rect").count() > 20
        await visitor.assert_sound()
        await visitor.page.get_by_role("link", name="Last day").click()
        await expect(visitor.page.get_by_text("each bar is half an hour")).to_be_visible()
