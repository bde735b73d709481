"""The pages of rebuilds: start, progress with and without JavaScript, cancellation, errors."""

from __future__ import annotations

import asyncio
import re

import pytest
from playwright.async_api import Browser, Page, Route, expect

from app.stores.queue.client import HEALTH_KEY
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.audit import newest_entries
from tests.support.browser import Scheme, looks, visiting
from tests.support.events import served
from tests.support.live import KEYS, Live, new_user
from tests.support.servers import VALKEY, StartServer, ask
from tests.support.site import ServeSite

WORKER_MISSING = "No worker is running"
ADMIN = {"X-API-Key": KEYS["admin"]}


async def some_users(site: Live, count: int = 4) -> list[str]:
    users = sorted(new_user() for _ in range(count))
    await site.send(*(served(user, site.now_ms) for user in users))
    return users


async def advance(site: Live, run_id: str, users: int) -> None:
    """Record that so many users of a rebuild are done."""
    part = await site.service.rebuild_runs.claim(run_id, "", "z", site.now_ms)
    assert part is not None
    await site.service.rebuild_runs.advance(part, users, "u", site.now_ms)


async def started(site: Live, **body: object) -> str:
    answer = await site.client.post("/admin/rebuilds", json=body or {"scope": "all"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def progress(page: Page) -> list[float]:
    found: list[float] = await page.locator("progress").evaluate("bar => [bar.value, bar.max]")
    return found


def run_id(page: Page) -> str:
    return page.url.rpartition("/")[2]


async def test_page_is_sound_when_there_is_no_run(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rebuilds")
        await visitor.assert_sound()
        assert "No rebuild is active" in await visitor.text()
        assert "No rebuild has ended yet" in await visitor.text()


@looks
async def test_pages_are_sound_with_runs(own_site: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    users = await some_users(own_site)
    failed = await started(own_site, user_ids=users[:2], features=["tip_volume_30d"])
    await own_site.service.rebuild_runs.finish(failed, "failed", own_site.now_ms, "<img src=x onerror=alert(1)>" * 20)
    done = await started(own_site, user_ids=users)
    await own_site.service.rebuild_runner.run(done, budget_s=30)
    running = await started(own_site)
    await advance(own_site, running, 2)
    async with visiting(browser, own_site, scheme=scheme, width=width) as visitor:
        await visitor.go("/admin/rebuilds")
        await visitor.assert_sound()
        assert "<img src=x onerror=alert(1)>" in await visitor.text()
        for run in (failed, done, running):
            await visitor.go(f"/admin/rebuilds/{run}")
            await visitor.assert_sound()


async def test_all_users_are_rebuilt_with_the_chosen_features(own_site: Live, browser: Browser) -> None:
    await some_users(own_site)
    async with visiting(browser, own_site) as visitor:
        page = visitor.page
        await visitor.go("/admin/rebuilds")
        for box in await page.get_by_role("checkbox").all():
            await box.uncheck()
        await page.get_by_role("button", name="Start the rebuild").click()
        await expect(page.get_by_role("alert")).to_contain_text("features: choose at least one")
        await page.get_by_label("tip_volume_30d").check()
        await page.get_by_role("button", name="Start the rebuild").click()
        await expect(page.get_by_role("status").first).to_have_text("The rebuild is queued.")
        run = await own_site.service.rebuild_runs.get(run_id(page))
        assert run is not None
        assert (run.scope, run.features, run.total) == ("all", ["tip_volume_30d"], 4)
        await own_site.service.rebuild_runner.run(run.id, budget_s=30)
        await expect(page.locator("[data-part=state]")).to_have_text("completed")


async def test_list_is_rebuilt_without_blanks_and_repeats(own_site: Live, browser: Browser) -> None:
    users = await some_users(own_site)
    async with visiting(browser, own_site, scripts=False) as visitor:
        await visitor.go("/admin/rebuilds")
        await visitor.page.get_by_label("The users of this list").check()
        await visitor.page.get_by_label("User ids").fill(f"{users[0]}\n\n  {users[1]}  \r\n{users[0]}\nnobody 🎯\n")
        await visitor.page.get_by_role("button", name="Start the rebuild").click()
        run = await own_site.service.rebuild_runs.get(run_id(visitor.page))
        assert run is not None
        assert run.user_ids == [users[0], users[1], "nobody 🎯"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "user_ids: write one id on each line"),
        ("fine\na/b\n<script>alert(1)</script>", "line 2: must not contain /"),
        ("\n".join(f"u{number}" for number in range(1_001)), "at most 1,000 users at once, not 1,001"),
    ],
)
async def test_form_keeps_its_values_when_the_list_is_invalid(
    own_site: Live, browser: Browser, text: str, place: str
) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rebuilds")
        await visitor.page.get_by_label("The users of this list").check()
        await visitor.page.get_by_label("preferred_hour").uncheck()
        await visitor.page.get_by_label("User ids").fill(text)
        async with visitor.page.expect_response("**/admin/rebuilds") as answer:
            await visitor.page.get_by_role("button", name="Start the rebuild").click()
        assert (await answer.value).status == 422
        await expect(visitor.page.get_by_role("alert")).to_contain_text(place)
        await expect(visitor.page.get_by_label("User ids")).to_have_value(text)
        await expect(visitor.page.get_by_label("The users of this list")).to_be_checked()
        await expect(visitor.page.get_by_label("preferred_hour")).not_to_be_checked()
        await visitor.assert_sound()
    assert await own_site.service.rebuild_runs.newest(10) == []


async def test_second_start_links_to_the_active_run(own_site: Live, browser: Browser) -> None:
    await some_users(own_site)
    run = await started(own_site)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rebuilds")
        async with visitor.page.expect_response("**/admin/rebuilds") as answer:
            await visitor.page.get_by_role("button", name="Start the rebuild").click()
        assert (await answer.value).status == 409
        alert = visitor.page.get_by_role("alert")
        await expect(alert).to_contain_text("is queued, at 0 of 4 users")
        await visitor.assert_sound()
        await alert.get_by_role("link").click()
        await expect(visitor.page).to_have_url(f"{own_site.url}/admin/rebuilds/{run}")
    assert len(await own_site.service.rebuild_runs.newest(10)) == 1


async def test_bar_moves_during_the_run(own_site: Live, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.profiles.rebuild.CHUNK", 1)
    users = await some_users(own_site)
    run = await started(own_site)
    async with visiting(browser, own_site) as visitor:
        page = visitor.page
        await visitor.go(f"/admin/rebuilds/{run}")
        assert await progress(page) == [0, 4]
        await page.evaluate("window.loadedOnce = true")
        seen = []
        for done in range(1, len(users)):
            assert await own_site.service.rebuild_runner.run(run, budget_s=-1) is False
            await expect(page.locator("[data-part=done]")).to_have_text(str(done))
            seen.append((await progress(page))[0])
            await expect(page.locator("[data-part=state]")).to_have_text("running")
            await expect(page.locator("[data-part=pace]")).to_contain_text("per second, about")
        assert seen == [1, 2, 3]
        await expect(page.get_by_text(WORKER_MISSING)).to_be_hidden()
        assert await own_site.service.rebuild_runner.run(run, budget_s=30)
        await expect(page.locator("[data-part=state]")).to_have_text("completed")
        assert await progress(page) == [4, 4]
        await expect(page.get_by_text("Cancel")).to_have_count(0)
        await expect(page.locator("[data-part=finished] time")).to_have_count(1)
        assert await page.evaluate("window.loadedOnce")
        await visitor.assert_sound()


async def test_bar_moves_again_after_failed_requests(own_site: Live, browser: Browser) -> None:
    await some_users(own_site)
    run = await started(own_site)
    failures = iter(["502", "refused", "no JSON"])

    async def fail_at_first(route: Route) -> None:
        match None if route.request.is_navigation_request() else next(failures, None):
            case "502":
                await route.fulfill(status=502, body="bad gateway")
            case "refused":
                await route.abort("connectionrefused")
            case "no JSON":
                await route.fulfill(body="<html>")
            case _:
                await route.continue_()

    async with visiting(browser, own_site) as visitor:
        await visitor.page.route("**/admin/rebuilds/*", fail_at_first)  # before the page can poll
        await visitor.go(f"/admin/rebuilds/{run}")
        await advance(own_site, run, 3)
        await expect(visitor.page.locator("[data-part=done]")).to_have_text("3", timeout=20_000)
        assert next(failures, None) is None


async def test_page_stops_polling_when_the_run_has_ended(own_site: Live, browser: Browser) -> None:
    await some_users(own_site)
    run = await started(own_site)
    async with visiting(browser, own_site) as visitor:
        await visitor.page.clock.install()
        await visitor.go(f"/admin/rebuilds/{run}")
        await own_site.service.rebuild_runner.run(run, budget_s=30)
        await visitor.page.clock.fast_forward(1_500)
        await expect(visitor.page.locator("[data-part=state]")).to_have_text("completed")
        requests: list[str] = []
        visitor.page.on("request", lambda request: requests.append(request.url))
        await visitor.page.clock.run_for(10_000)
        assert requests == []


async def test_page_leads_to_sign_in_when_the_session_ends(keyed: Live, browser: Browser) -> None:
    run = (await keyed.client.post("/admin/rebuilds", json={"user_ids": [new_user()]}, headers=ADMIN)).json()["id"]
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await visitor.go(f"/admin/rebuilds/{run}")
        await visitor.context.clear_cookies()
        await expect(visitor.page.get_by_label("API key")).to_be_visible()


async def test_page_reloads_when_there_is_no_javascript(own_site: Live, browser: Browser) -> None:
    await some_users(own_site)
    run = await started(own_site)
    async with visiting(browser, own_site, scripts=False) as visitor:
        await visitor.go(f"/admin/rebuilds/{run}")
        await expect(visitor.page.locator("noscript meta[http-equiv=refresh]")).to_have_count(1)
        await advance(own_site, run, 3)
        await visitor.page.get_by_role("link", name="Reload").click()
        await expect(visitor.page.locator("progress")).to_have_attribute("value", "3")
        await own_site.service.rebuild_runs.finish(run, "failed", own_site.now_ms, "it broke")
        await visitor.page.reload()
        await expect(visitor.page.locator("meta[http-equiv=refresh]")).to_have_count(0)
        await expect(visitor.page.get_by_text("it broke")).to_be_visible()


@pytest.mark.parametrize("scripts", [True, False])
async def test_run_is_cancelled_when_it_is_confirmed(own_site: Live, browser: Browser, scripts: bool) -> None:
    await some_users(own_site)
    run = await started(own_site)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page
        await visitor.go(f"/admin/rebuilds/{run}")
        confirm = page.get_by_role("button", name="Cancel the rebuild")
        await expect(confirm).to_be_hidden()
        await page.locator("summary", has_text="Cancel").click()
        await confirm.click()
        await expect(page.get_by_role("status").first).to_have_text("The rebuild was cancelled at 0 of 4 users.")
        await expect(page.locator("[data-part=state]")).to_have_text("cancelled")
        await visitor.assert_sound() if scripts else None
    (entry, _) = await newest_entries(own_site.service.audit_trail, 2)
    assert (entry.action, entry.outcome) == ("cancel rebuild", run)


async def test_cancellation_fails_when_the_run_has_ended(own_site: Live, browser: Browser) -> None:
    run = await started(own_site, user_ids=["u"])
    async with visiting(browser, own_site, scripts=False) as visitor:
        await visitor.go(f"/admin/rebuilds/{run}")
        await own_site.service.rebuild_runner.run(run, budget_s=30)
        await visitor.page.locator("summary", has_text="Cancel").click()
        await visitor.page.get_by_role("button", name="Cancel the rebuild").click()
        await expect(visitor.page.get_by_role("status").first).to_contain_text("it is completed")


async def test_list_shows_the_key_and_the_state_of_a_run(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await visitor.go("/admin/rebuilds")
        await visitor.page.get_by_label("The users of this list").check()
        await visitor.page.get_by_label("User ids").fill(new_user())
        await visitor.page.get_by_role("button", name="Start the rebuild").click()
        await keyed.service.rebuild_runner.run(run_id(visitor.page), budget_s=30)
        await expect(visitor.page.locator("[data-part=state]")).to_have_text("completed")  # live, by the session
        await visitor.go("/admin/rebuilds")
        row = visitor.page.locator("tbody tr").first
        await expect(row).to_contain_text("admin")
        await expect(row).to_contain_text("A list of 1 user")
        await expect(row).to_contain_text("completed")
        await visitor.assert_sound()


async def test_page_warns_when_no_worker_is_running(
    own_site: Live, browser: Browser, queue_server: EmbeddedServer
) -> None:
    run = await started(own_site, user_ids=["u"])
    async with visiting(browser, own_site) as visitor:
        for path in ("/admin/rebuilds", f"/admin/rebuilds/{run}"):
            await visitor.go(path)
            await expect(visitor.page.get_by_text(WORKER_MISSING)).to_be_visible()
            ask(queue_server, "SET", HEALTH_KEY, "alive", "PX", "60000")
            try:
                await visitor.page.reload()
                await expect(visitor.page.get_by_text(WORKER_MISSING)).to_have_count(0)
            finally:
                ask(queue_server, "DEL", HEALTH_KEY)


async def test_page_is_quick_when_cache_and_queue_are_down(
    serve_site: ServeSite, browser: Browser, start_server: StartServer
) -> None:
    cache, queue = start_server(VALKEY), start_server(VALKEY)
    async with serve_site(cache_url=cache.url, queue_url=queue.url, cache_timeout_ms=100) as site:
        run = await started(site, user_ids=["u"])
        cache.kill()
        queue.kill()
        async with visiting(browser, site) as visitor:
            async with asyncio.timeout(5):
                await visitor.go("/admin/rebuilds")
                await visitor.go(f"/admin/rebuilds/{run}")
            text = await visitor.text()
            assert "The queue does not answer" in text
            assert "The cache does not accept values" in text
            await visitor.assert_sound()


async def test_run_is_an_error_page_when_it_does_not_exist(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rebuilds/<b>nope", status=404)
        assert re.search(r"There is no rebuild <b>nope", await visitor.text())
