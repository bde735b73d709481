"""The page of the roll-out: sound at every stage, and its forms do what they say, without script too."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser, expect

from app.bandit.rollout_watch import RolloutWatch
from app.bandit.stages import Target
from tests.support.browser import NARROW, WIDE, Scheme, visiting
from tests.support.decisions import HOUR_MS, rows_of, some, write
from tests.support.live import Live

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def decide(site: Live, *sizes: int) -> None:
    """Settled decisions of days ago, with a look after so many each."""
    rows = rows_of(some(sum(sizes)), made_ms=site.now_ms - 100 * HOUR_MS)
    watch = RolloutWatch(site.service.bandit.rollout, site.service.clock)
    for size in sizes:
        await write(site.service.database, rows[:size])
        rows = rows[size:]
        await watch.once()


async def test_page_says_what_it_waits_for_when_nothing_was_decided(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        said = await visitor.text()
        assert "No look has been made yet. The first one is made at 1\u202f000 evaluated decisions" in said
        assert "It cannot be ramped on this verdict." in said
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
        await expect(visitor.page.get_by_role("alert")).to_contain_text("100.0% of the decisions were made without")
        await expect(visitor.page.get_by_role("row", name="Decisions without a profile")).to_contain_text("broken")
        await visitor.assert_sound()


@pytest.mark.parametrize("scripts", [True, False])
async def test_challenger_is_ramped_rolled_back_and_begun_anew_from_the_page(
    own_site: Live, browser: Browser, scripts: bool
) -> None:
    await decide(own_site, 4_000)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page

        async def press(summary: str, button: str, reason: str, said: str) -> None:
            await page.locator("main summary", has_text=summary).click()
            form = page.locator("details[open] form")
            await form.get_by_label("Why?").fill(reason)
            await form.get_by_role("button", name=button, exact=True).click()
            await expect(page.get_by_role("status")).to_have_text(said)

        await visitor.go("/admin/rollout")
        await expect(page.get_by_role("heading", name="Verdict: promote an improvement")).to_be_visible()
        await press("Ramp to 5", "Ramp", "looks good", "The roll-out is at: 5%.")
        assert "serves 5\u202f% of the users" in await visitor.text()
        assert ": looks good" in await visitor.text()
        assert (
            "It cannot be ramped now: of the decisions that the challenger served at 5%, 0 are" in await visitor.text()
        )
        await press("Roll back", "Roll back", "complaints", "The roll-out is at: rolled back.")
        await press("Begin anew", "Begin anew", "", "The roll-out is at: shadow.")
        assert "No look has been made yet" in await visitor.text()


async def test_challenger_is_promoted_from_the_page(own_site: Live, browser: Browser) -> None:
    await decide(own_site, 4_000)
    book = own_site.service.bandit.rollout.book
    await book.move(await book.state(), Target("ramp", 1.0), "", "ann", own_site.now_ms - 2_000)
    served = rows_of(some(250, share=1.0, seed=2), made_ms=own_site.now_ms - 1_000)
    await write(own_site.service.database, served)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/rollout")
        await visitor.page.locator("main summary", has_text="Promote").click()
        await visitor.page.get_by_role("button", name="Promote", exact=True).click()
        await expect(visitor.page.get_by_role("status")).to_have_text("The roll-out is at: promoted.")
        assert "is promoted: it serves everybody" in await visitor.text()
        await visitor.assert_sound()
