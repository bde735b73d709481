"""The page of the audit trail."""

import pytest
from playwright.async_api import Browser, expect

from app.features.ids import user_hash
from tests.support.browser import Scheme, looks, visiting
from tests.support.live import KEYS, Live, new_user

EVIL = "<script>document.title='taken'</script>"


async def write(site: Live, actor: str, action: str, subject: str, outcome: str = "done") -> None:
    await site.service.audit_trail.begin(site.now_ms, actor, action, subject, outcome)


async def test_page_is_sound_when_there_is_no_entry(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/audit")
        assert "No action has been recorded yet" in await visitor.text()
        await visitor.assert_sound()


@looks
async def test_every_outcome_is_shown_as_text(own_site: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    for outcome in ("done", "begun", f"refused: {EVIL}", f"failed: {EVIL}", "done, 3 events", f"done: {EVIL * 10}"):
        await write(own_site, EVIL, EVIL, user_hash("ann"), outcome)
    async with visiting(browser, own_site, scheme=scheme, width=width) as visitor:
        await visitor.go("/admin/audit")
        await visitor.assert_sound()
        states = await visitor.page.locator("tbody .badge").all_inner_texts()
        assert states == ["done", "done", "failed", "refused", "begun", "done"]
        assert await visitor.page.title() != "taken"
        assert await visitor.page.locator("main script").count() == 0
        await expect(visitor.page.locator("tbody tr").nth(1)).to_contain_text("3 events")


async def test_entries_are_filtered_and_paged(
    own_site: Live, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.admin.audit_trail.ENTRIES_PER_PAGE", 2)
    for number in range(6):
        await write(own_site, "ann" if number % 2 else "bob", "erase", f"s{number}")
    async with visiting(browser, own_site, scripts=False) as visitor:
        page = visitor.page
        await visitor.go("/admin/audit")
        await page.get_by_label("Actor", exact=True).fill("ann")
        await page.get_by_role("button", name="Show").click()
        subjects = page.locator("tbody td[data-label=Subject]")
        await expect(subjects).to_have_text(["s5", "s3"])
        await page.get_by_role("link", name="Older").click()
        await expect(subjects).to_have_text(["s1"])
        await expect(page.get_by_label("Actor", exact=True)).to_have_value("ann")
        await page.get_by_role("link", name="Newest").click()
        await expect(subjects).to_have_text(["s5", "s3"])
        await subjects.last.get_by_role("link").click()
        await expect(subjects).to_have_text(["s3"])
        await page.get_by_label("Subject").fill("nothing")
        await page.get_by_role("button", name="Show").click()
        await visitor.expect_text("No entry matches")


async def test_entries_are_found_by_user_id(own_site: Live, browser: Browser) -> None:
    user = new_user()
    await own_site.client.delete(f"/admin/users/{user}")
    await write(own_site, "ann", "discard", "dead-letter:1")
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/audit")
        await visitor.page.get_by_label("Or user id").fill(user)
        await visitor.page.get_by_role("button", name="Show").click()
        await expect(visitor.page.locator("tbody tr")).to_have_count(1)
        await expect(visitor.page.locator("tbody tr")).to_contain_text("erase")
        await expect(visitor.page.get_by_label("Subject")).to_have_value(user_hash(user))
        assert user not in await visitor.page.content()
        await visitor.page.get_by_label("Or user id").fill(new_user())  # the subject of the last search is still there
        await visitor.page.get_by_role("button", name="Show").click()
        assert "No entry matches" in await visitor.text()


async def test_entries_of_rebuild_and_sign_in_are_shown(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        await visitor.go("/admin/rebuilds")
        await visitor.page.get_by_label("The users of this list").check()
        await visitor.page.get_by_label("User ids").fill(new_user())
        await visitor.page.get_by_role("button", name="Start the rebuild").click()
        await visitor.page.wait_for_url("**/admin/rebuilds/*")
        run = visitor.page.url
        await visitor.go("/admin/audit")
        first, second = visitor.page.locator("tbody tr").first, visitor.page.locator("tbody tr").nth(1)
        await expect(second).to_contain_text("sign in")
        await first.locator("td[data-label=Outcome] a").click()
        await expect(visitor.page).to_have_url(run)
