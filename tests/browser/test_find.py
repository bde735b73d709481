"""The search for users in a browser: completion, direct links, and ids as text."""

from urllib.parse import quote

import pytest
from playwright.async_api import Browser, expect

from tests.support.browser import Scheme, looks, visiting
from tests.support.events import served
from tests.support.live import Live, new_user

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


async def known(site: Live, *users: str) -> None:
    await site.send(*(served(user, site.now_ms) for user in users))


@looks
async def test_users_found_are_a_sound_page(site: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    stem = new_user("stem")
    await known(site, *(f"{stem}-{number:02d}" for number in range(25)))
    async with visiting(browser, site, scheme=scheme, width=width) as visitor:
        await visitor.go(f"/admin/users?prefix={stem}")
        await expect(visitor.page.locator(".ids a")).to_have_count(20)
        await visitor.assert_sound()
        await visitor.page.get_by_role("link", name="show 100").click()
        await expect(visitor.page.locator(".ids a")).to_have_count(25)
        await visitor.go(f"/admin/users?prefix={new_user()}")
        await expect(visitor.page.locator("main")).to_contain_text("No stored event")
        await visitor.assert_sound()


async def test_ids_are_completed_while_typing(site: Live, browser: Browser) -> None:
    stem = new_user("typed")
    await known(site, stem, f"{stem}-é 🎯")
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin")
        box = visitor.page.get_by_role("search").get_by_role("combobox")
        await box.focus()
        await visitor.page.keyboard.type(stem[:-2])
        options = visitor.page.locator("#find-user-found option")
        await expect(options).to_have_count(2)
        assert [await option.get_attribute("value") for option in await options.all()] == [stem, f"{stem}-é 🎯"]
        await box.fill(f"{stem}-é 🎯")
        await visitor.page.keyboard.press("Enter")
        await visitor.page.wait_for_url(f"**/admin/users/{quote(f'{stem}-é 🎯', safe='')}")


@pytest.mark.parametrize("scripts", [True, False])
async def test_complete_id_leads_to_its_user(site: Live, browser: Browser, scripts: bool) -> None:
    stem = new_user("stem")
    await known(site, stem, f"{stem}-2")
    async with visiting(browser, site, scripts=scripts) as visitor:
        await visitor.go("/admin")
        await visitor.page.locator("#find-user").fill(stem)
        await visitor.page.get_by_role("button", name="Find").click()
        await visitor.page.wait_for_url(f"**/admin/users/{stem}")
        await visitor.go(f"/admin/users?prefix={stem}&limit=5")
        await expect(visitor.page.locator(".ids a")).to_have_count(2)


async def test_ids_are_shown_as_text(site: Live, browser: Browser) -> None:
    user = new_user(HOSTILE)
    await known(site, user)
    async with visiting(browser, site) as visitor:
        await visitor.go(f"/admin/users?prefix={quote(HOSTILE)}")
        await expect(visitor.page.locator(".ids a", has_text=user)).to_have_attribute(
            "href", f"/admin/users/{quote(user, safe='')}"
        )
        await visitor.page.locator("#prefix").fill(HOSTILE[:-1])
        await expect(visitor.page.locator("#prefix-found option").first).to_have_attribute("value", user)
        assert await visitor.page.locator("main img").count() == 0
        await visitor.go(f"/admin/users?prefix={quote('<b>x</b>'.replace('/', ''))}")
        assert await visitor.page.locator("main b").count() == 0
        await visitor.assert_sound()


async def test_page_shows_the_error_when_the_prefix_is_invalid(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin/users?prefix=a%2Fb", status=400)
        await expect(visitor.page.locator("main")).to_contain_text("must not contain /")
        await visitor.assert_sound()
