"""The page of the roll-out at every stage, and its forms with and without JavaScript."""

import re
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from app.api.pages.templating import spelled
from tests.support.audit import newest_entries
from tests.support.browser import NARROW, WIDE, Scheme, looks, visiting
from tests.support.decisions import HOUR_MS, move_to, rows_of, some, write
from tests.support.live import API_KEYS, KEYS, Live


async def decide(site: Live, *sizes: int) -> None:
    """Store settled decisions of days ago, with a look after each number of them."""
    rows = rows_of(some(sum(sizes)), made_ms=site.now_ms - 100 * HOUR_MS)
    for size in sizes:
        await write(site.service.database, rows[:size])
        rows = rows[size:]
        await site.service.bandit.rollout.watch()


async def press(page: Page, summary: str, button: str, reason: str = "") -> None:
    """Open the form of a move, and send it with a reason."""
    await page.locator("main summary.button", has_text=summary).click()
    form = page.locator("details[open] form")
    if reason:
        await form.get_by_label("Why?").fill(reason)
    await form.get_by_role("button", name=button, exact=True).click()


async def test_page_shows_the_first_look_when_nothing_is_decided(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        assert "at 4\u202f000 evaluated decisions" in await visitor.text()
        await expect(visitor.page.locator("li[aria-current]")).to_have_text("shadow")
        await visitor.assert_sound()


@looks
async def test_page_is_sound_when_a_guardrail_is_broken(
    own_site: Live, browser: Browser, scheme: Scheme, width: int
) -> None:
    await decide(own_site, 4_000, 4_100)
    lately = rows_of(some(200, seed=2), made_ms=own_site.now_ms - 60_000, profile_present=0)
    await write(own_site.service.database, lately)
    async with visiting(browser, own_site, scheme=scheme, width=width) as visitor:
        await visitor.go("/admin/rollout")
        for summary in await visitor.page.locator("main summary").all():
            await summary.click()
        chart = visitor.page.get_by_role("img", name="Lift by look")
        await expect(chart).to_be_visible()
        await expect(visitor.page.get_by_role("alert")).to_contain_text("100\u202f% of the decisions were made without")
        await expect(visitor.page.get_by_role("row", name="Decisions without a profile")).to_contain_text("broken")
        assert re.findall(r"\d%|\d,\d{3}|-0\.0+\b", await visitor.text()) == [], "numbers are spelled in one way"
        await visitor.assert_sound()


@pytest.mark.parametrize("scripts", [True, False])
async def test_challenger_is_ramped_rolled_back_and_restarted(own_site: Live, browser: Browser, scripts: bool) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page

        await visitor.go("/admin/rollout")
        await expect(page.get_by_role("heading", name="Verdict: promote an improvement")).to_be_visible()
        await press(page, "Ramp to 5", "Ramp", "looks good")
        await expect(page.get_by_role("status")).to_contain_text("serves 5\u202f% of the users")
        await visitor.expect_text(": looks good")
        await visitor.expect_text("0 are")  # decisions of the challenger, so it cannot be ramped again
        await press(page, "Roll back", "Roll back", "complaints")
        await expect(page.get_by_role("status")).to_contain_text("is rolled back")
        await expect(page.get_by_text("Verdict:")).to_have_count(0)
        await press(page, "Restart", "Restart")
        await expect(page.get_by_role("status")).to_contain_text("in the shadow")
        await visitor.expect_text("No look has been made yet")


async def test_reason_is_formatted_when_it_is_the_verdict(own_site: Live, browser: Browser) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site) as visitor:
        await own_site.client.post("/admin/rollout/ramp")
        await visitor.go("/admin/rollout")
        assert "by anyone: Over 4\u202f000 decisions of 400 users" in await visitor.text()
        await own_site.client.post("/admin/rollout/rollback", json={"reason": "1,250 complaints, 9%"})
        await visitor.go("/admin/rollout")
        assert "by anyone: 1,250 complaints, 9%" in await visitor.text()


async def on_trial(site: Live, share: float, served: int = 250) -> None:
    """Ramp to a share, with a verdict that allows the next step and decisions that the challenger served."""
    await decide(site, 4_000)
    await move_to(site.service, "ramp", share)
    page = some(int(served / share), share=share, seed=2)
    await write(site.service.database, rows_of(page, made_ms=site.now_ms - 1_000))


@pytest.mark.parametrize("scripts", [True, False])
async def test_second_tab_does_not_repeat_a_step(own_site: Live, browser: Browser, scripts: bool) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        await visitor.go("/admin/rollout")
        stale = await visitor.context.new_page()
        await stale.goto(own_site.url + "/admin/rollout")
        for page in (visitor.page, stale):
            await page.locator("main summary.button", has_text="Ramp to 5").click()
        await visitor.page.get_by_role("button", name="Ramp", exact=True).click()
        await expect(visitor.page.get_by_role("status")).to_contain_text("serves 5\u202f% of the users")
        # By now another step would be allowed, but it is not what the other tab's button says.
        served = rows_of(some(5_000, share=0.05, seed=2), made_ms=own_site.now_ms)
        await write(own_site.service.database, served)
        await stale.get_by_role("button", name="Ramp", exact=True).click()
        await expect(stale.get_by_role("status")).to_contain_text("Nothing was changed: the roll-out has changed")
        await expect(stale.get_by_role("status")).to_contain_text("moved it to 5\u202f% of the users")
        assert (await own_site.service.bandit.rollout.repository.state()).share == 0.05
        (newest,) = await newest_entries(own_site.service.audit_trail, 1)
        assert (newest.action, newest.outcome.partition(":")[0]) == ("ramp roll-out", "refused")
        # Having looked again, one may.
        await press(stale, "Ramp to 25", "Ramp")
        await expect(stale.get_by_role("status")).to_contain_text("serves 25\u202f% of the users")


async def test_double_click_makes_one_step(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 0.05)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary.button", has_text="Ramp to 25").click()
        await visitor.page.get_by_role("button", name="Ramp", exact=True).dblclick()
        await expect(visitor.page.get_by_role("status")).to_be_visible()
        assert (await own_site.service.bandit.rollout.repository.state()).share == 0.25


async def test_rollback_works_from_an_outdated_page(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 0.05)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await move_to(own_site.service, "ramp", 0.25)
        await press(visitor.page, "Roll back", "Roll back", "complaints")
        await expect(visitor.page.get_by_role("status")).to_contain_text("is rolled back")
        assert (await own_site.service.bandit.rollout.repository.state()).stage == "rolled back"


async def test_every_step_can_be_made_by_keyboard(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 0.05)
    async with visiting(browser, own_site) as visitor:
        page = visitor.page
        await visitor.go("/admin/rollout")
        await page.get_by_role("link", name="All changes").focus()
        for keys in ("Tab", "Enter", "Tab", "looks good", "Tab", "Enter"):
            await (page.keyboard.press(keys) if keys in ("Tab", "Enter") else page.keyboard.type(keys))
        await expect(page.get_by_role("status")).to_contain_text("serves 25\u202f% of the users")
        # Going back needs a word of why: without one the browser keeps the form.
        await page.get_by_role("link", name="All changes").focus()
        for keys in ("Tab", "Space", "Tab", "Enter"):
            await page.keyboard.press(keys)
        assert (await own_site.service.bandit.rollout.repository.state()).share == 0.25
        await page.keyboard.type("complaints")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("status")).to_contain_text("is rolled back")


async def test_step_is_refused_when_the_verdict_has_changed(own_site: Live, browser: Browser) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary.button", has_text="Ramp to 5").click()
        lately = rows_of(some(200, seed=2), made_ms=own_site.now_ms - 60_000, profile_present=0)
        await write(own_site.service.database, lately)
        await visitor.page.get_by_role("button", name="Ramp", exact=True).click()
        refusal = await visitor.page.get_by_role("status").inner_text()
        assert refusal.startswith("Nothing was changed: roll back: 100\u202f% of the decisions")
        assert not refusal.endswith("..")


async def test_page_asks_for_an_improvement_when_only_that_is_missing(own_site: Live, browser: Browser) -> None:
    rows = rows_of(some(4_000, skill=0.0), made_ms=own_site.now_ms - 100 * HOUR_MS)
    await write(own_site.service.database, rows)
    await own_site.service.bandit.rollout.watch()
    await move_to(own_site.service, "ramp", 1.0)
    await write(own_site.service.database, rows_of(some(250, share=1.0, seed=2), made_ms=own_site.now_ms - 1_000))
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await expect(visitor.page.get_by_role("heading", name="Verdict: promote")).to_be_visible()
        assert "It can be promoted once an improvement is shown." in await visitor.text()


@pytest.mark.parametrize("width", [NARROW, WIDE])
async def test_page_announces_no_look_when_none_follows(
    own_site: Live, serve_site: Any, browser: Browser, width: int
) -> None:
    rollout = own_site.service.bandit.rollout
    await rollout.move("rollback", "ann", "")
    async with visiting(browser, own_site, width=width) as visitor:
        await visitor.go("/admin/rollout")
        assert "next look at" not in await visitor.text()
        await visitor.assert_sound()
    async with serve_site(shadow=False) as site, visiting(browser, site, width=width) as visitor:
        await visitor.go("/admin/rollout")
        assert "next look at" not in await visitor.text()
        assert await visitor.page.locator("main summary.button").count() == 0
        await visitor.assert_sound()


async def test_step_is_recorded_with_the_key_of_the_session(serve_site: Any, browser: Browser) -> None:
    async with serve_site(api_keys=API_KEYS) as site, visiting(browser, site) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await visitor.go("/admin/rollout")
        await press(visitor.page, "End the trial", "End", "<b>complaints</b>")
        await expect(visitor.page.get_by_role("status")).to_contain_text("is rolled back")
        await visitor.expect_text("by admin: <b>complaints</b>")
        await visitor.page.get_by_role("link", name="All changes").click()
        row = visitor.page.get_by_role("row", name="roll back roll-out")
        await expect(row).to_contain_text("done shadow to rolled back: <b>complaints</b>")


async def test_reason_of_a_look_can_be_read_by_keyboard(own_site: Live, browser: Browser) -> None:
    await decide(own_site, 4_000)
    (look,) = await own_site.service.bandit.rollout.repository.looks()
    async with visiting(browser, own_site, width=NARROW) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("details.said summary").focus()
        await visitor.page.keyboard.press("Enter")
        await expect(visitor.page.locator("details.said")).to_contain_text(spelled(look.verdict.reason))
        await visitor.assert_sound()


async def test_challenger_is_promoted_from_the_page(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 1.0)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await press(visitor.page, "Promote", "Promote")
        await expect(visitor.page.get_by_role("status")).to_have_text("The challenger is promoted.")
        await visitor.expect_text("is promoted: it serves every user")
        await visitor.assert_sound()
