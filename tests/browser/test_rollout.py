"""The page of the roll-out: sound at every stage, and its forms do what they say, without script too."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import Browser, expect

from app.api.pages.templating import spelled
from app.bandit.rollout.monitor import RolloutMonitor
from app.bandit.rollout.stages import Target
from tests.support.browser import NARROW, WIDE, Scheme, visiting
from tests.support.decisions import HOUR_MS, rows_of, some, write
from tests.support.live import API_KEYS, KEYS, Live


async def decide(site: Live, *sizes: int) -> None:
    """Store settled decisions of days ago, with a look after each number of them."""
    rows = rows_of(some(sum(sizes)), made_ms=site.now_ms - 100 * HOUR_MS)
    watch = RolloutMonitor(site.service.bandit.rollout, site.service.clock)
    for size in sizes:
        await write(site.service.database, rows[:size])
        rows = rows[size:]
        await watch.once()


async def test_page_says_what_it_waits_for_when_nothing_was_decided(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        said = await visitor.text()
        assert "No look has been made yet. A worker makes the first one at 1\u202f000 evaluated decisions" in said
        assert "It can be ramped once the verdict is “promote”." in said
        assert "has not been changed yet" in said
        await expect(visitor.page.get_by_role("listitem").and_(visitor.page.locator("[aria-current]"))).to_have_text(
            "shadow"
        )
        await visitor.assert_sound()


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_is_sound_when_there_are_looks_and_a_guardrail_is_broken(
    own_site: Live, browser: Browser, scheme: Scheme, width: int
) -> None:
    await decide(own_site, 1_000, 1_100, 2_000)
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
async def test_challenger_is_ramped_rolled_back_and_begun_anew_from_the_page(
    own_site: Live, browser: Browser, scripts: bool
) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page

        async def press(summary: str, button: str, reason: str, said: str) -> None:
            await page.locator("main summary.button", has_text=summary).click()
            form = page.locator("details[open] form")
            await form.get_by_label("Why?").fill(reason)
            await form.get_by_role("button", name=button, exact=True).click()
            await expect(page.get_by_role("status")).to_have_text(said)

        await visitor.go("/admin/rollout")
        await expect(page.get_by_role("heading", name="Verdict: promote an improvement")).to_be_visible()
        await press("Ramp to 5", "Ramp", "looks good", "The challenger now serves 5\u202f% of the users.")
        assert "serves 5\u202f% of the users" in await visitor.text()
        assert ": looks good" in await visitor.text()
        assert (
            "It cannot be ramped now: of the decisions that the challenger served at 5\u202f%, 0 are"
            in await visitor.text()
        )
        said = "The challenger is rolled back. The champion now serves every user."
        await press("Roll back", "Roll back", "complaints", said)
        assert "No more looks are made." in await visitor.text()
        assert await page.get_by_text("Verdict:").count() == 0
        await press("Restart", "Restart", "", "The roll-out starts again in the shadow.")
        assert "No look has been made yet" in await visitor.text()


async def test_reason_of_a_step_is_spelled_as_the_page_when_it_is_the_verdicts_and_kept_when_it_is_somebodys(
    own_site: Live, browser: Browser
) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site) as visitor:
        await own_site.client.post("/admin/rollout/ramp")
        await visitor.go("/admin/rollout")
        assert "by anyone: Over 4\u202f000 decisions of 400 users" in await visitor.text()
        await own_site.client.post("/admin/rollout/rollback?reason=1,250+complaints,+9%25")
        await visitor.go("/admin/rollout")
        assert "by anyone: 1,250 complaints, 9%" in await visitor.text()


async def on_trial(site: Live, share: float, served: int = 250) -> None:
    """Ramp to a share, with a verdict that allows the next step and decisions that the challenger served."""
    await decide(site, 4_000)
    book = site.service.bandit.rollout.repository
    await book.move(await book.state(), Target("ramp", share), "looks good", "ann", site.now_ms - 2_000)
    await write(site.service.database, rows_of(some(served, share=1.0, seed=2), made_ms=site.now_ms - 1_000))


@pytest.mark.parametrize("scripts", [True, False])
async def test_second_tab_does_no_second_step_when_the_first_one_has_done_it(
    own_site: Live, browser: Browser, scripts: bool
) -> None:
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
        served = rows_of(some(250, share=1.0, seed=2), made_ms=own_site.now_ms)
        await write(own_site.service.database, served)
        await stale.get_by_role("button", name="Ramp", exact=True).click()
        await expect(stale.get_by_role("status")).to_contain_text("Nothing was changed: the roll-out has changed")
        await expect(stale.get_by_role("status")).to_contain_text("moved it to 5\u202f% of the users")
        assert (await own_site.service.bandit.rollout.repository.state()).share == 0.05
        (newest,) = await own_site.service.audit_trail.newest(1)
        assert (newest.action, newest.outcome.partition(":")[0]) == ("ramp roll-out", "refused")
        # Having looked again, one may.
        await stale.locator("main summary.button", has_text="Ramp to 25").click()
        await stale.get_by_role("button", name="Ramp", exact=True).click()
        await expect(stale.get_by_role("status")).to_contain_text("serves 25\u202f% of the users")


async def test_button_that_is_pressed_twice_goes_one_step(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 0.05)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary.button", has_text="Ramp to 25").click()
        await visitor.page.get_by_role("button", name="Ramp", exact=True).dblclick()
        await expect(visitor.page.get_by_role("status")).to_be_visible()
        assert (await own_site.service.bandit.rollout.repository.state()).share == 0.25


async def test_rolling_back_from_a_page_that_is_out_of_date_rolls_back(own_site: Live, browser: Browser) -> None:
    await on_trial(own_site, 0.05)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        book = own_site.service.bandit.rollout.repository
        await book.move(await book.state(), Target("ramp", 0.25), "", "ann", own_site.now_ms)
        await visitor.page.locator("main summary.button", has_text="Roll back").click()
        await visitor.page.get_by_role("textbox", name="Why?").fill("complaints")
        await visitor.page.get_by_role("button", name="Roll back", exact=True).click()
        await expect(visitor.page.get_by_role("status")).to_contain_text("is rolled back")
        assert (await book.state()).stage == "rolled back"


async def test_every_step_can_be_made_by_keyboard_alone(own_site: Live, browser: Browser) -> None:
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


async def test_refusal_is_said_in_one_sentence_when_the_verdict_changed_meanwhile(
    own_site: Live, browser: Browser
) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary.button", has_text="Ramp to 5").click()
        lately = rows_of(some(200, seed=2), made_ms=own_site.now_ms - 60_000, profile_present=0)
        await write(own_site.service.database, lately)
        await visitor.page.get_by_role("button", name="Ramp", exact=True).click()
        said = await visitor.page.get_by_role("status").inner_text()
        assert said.startswith(
            "Nothing was changed: roll back: 100\u202f% of the decisions were made without a profile"
        )
        assert not said.endswith("..")


async def test_page_does_not_say_that_the_verdict_forbids_it_when_only_an_improvement_is_missing(
    own_site: Live, browser: Browser
) -> None:
    rows = rows_of(some(4_000, skill=0.0), made_ms=own_site.now_ms - 100 * HOUR_MS)
    await write(own_site.service.database, rows)
    await RolloutMonitor(own_site.service.bandit.rollout, own_site.service.clock).once()
    book = own_site.service.bandit.rollout.repository
    await book.move(await book.state(), Target("ramp", 1.0), "", "ann", own_site.now_ms - 2_000)
    await write(own_site.service.database, rows_of(some(250, share=1.0, seed=2), made_ms=own_site.now_ms - 1_000))
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await expect(visitor.page.get_by_role("heading", name="Verdict: promote")).to_be_visible()
        assert "It can be promoted once an improvement is shown." in await visitor.text()


@pytest.mark.parametrize("width", [NARROW, WIDE])
async def test_page_promises_no_look_when_there_will_be_none(
    own_site: Live, serve_site: Any, browser: Browser, width: int
) -> None:
    rollout = own_site.service.bandit.rollout
    await rollout.move("rollback", "ann", "")
    async with visiting(browser, own_site, width=width) as visitor:
        await visitor.go("/admin/rollout")
        assert "next look at" not in await visitor.text()
        assert "No look was made before the roll-out ended." in await visitor.text()
        await visitor.assert_sound()
    async with serve_site(shadow=False) as site, visiting(browser, site, width=width) as visitor:
        await visitor.go("/admin/rollout")
        assert "next look at" not in await visitor.text()
        assert "Without a challenger no looks are made." in await visitor.text()
        assert await visitor.page.locator("main summary.button").count() == 0
        await visitor.assert_sound()


async def test_who_has_signed_in_is_named_as_who_did_it(serve_site: Any, browser: Browser) -> None:
    async with serve_site(api_keys=API_KEYS) as site, visiting(browser, site) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary.button", has_text="Roll back").click()
        await visitor.page.get_by_role("textbox", name="Why?").fill("<b>complaints</b>")
        await visitor.page.get_by_role("button", name="Roll back", exact=True).click()
        await expect(visitor.page.get_by_role("status")).to_contain_text("is rolled back")
        assert "by admin: <b>complaints</b>" in await visitor.text()
        await visitor.page.get_by_role("link", name="All changes").click()
        row = visitor.page.get_by_role("row", name="roll back roll-out")
        await expect(row).to_contain_text("done shadow to rolled back: <b>complaints</b>")


async def test_what_a_look_said_can_be_read_without_a_mouse(own_site: Live, browser: Browser) -> None:
    await decide(own_site, 1_000)
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
        await visitor.page.locator("main summary.button", has_text="Promote").click()
        await visitor.page.get_by_role("button", name="Promote", exact=True).click()
        await expect(visitor.page.get_by_role("status")).to_have_text("The challenger is promoted.")
        assert "is promoted: it serves every user" in await visitor.text()
        await visitor.assert_sound()
