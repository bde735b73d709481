"""Rebuilding and erasing a user from the pages."""

import hashlib

from playwright.async_api import Browser, expect

from app.features.events import TipEvent
from app.stores.valkey.embedded import EmbeddedServer
from tests.browser.test_user import address, feature, lively
from tests.integration.api.admin.test_users import cached_keys, put
from tests.support.audit import newest_entries
from tests.support.browser import visiting
from tests.support.events import feedback, served
from tests.support.live import KEYS, Live, as_caller, new_user
from tests.support.registry import REGISTRY


async def test_rebuild_shows_values_before_and_after(
    own_site: Live, browser: Browser, cache_server: EmbeddedServer
) -> None:
    site = own_site
    user = await lively(site)
    await put(site, cache_server, user, "tip_volume_30d", seq=10**9)
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        await visitor.page.get_by_role("button", name="Rebuild all").click()
        await expect(visitor.page.get_by_role("status")).to_have_text(
            "5 features were recomputed. 1 differs from the cached value."
        )
        rows = visitor.page.locator("tbody tr")
        await expect(rows).to_have_count(len(REGISTRY))
        changed = rows.filter(has_text="tip_volume_30d")
        assert (await changed.locator("td.number").all_inner_texts()) == ["77", "29"]
        await expect(changed).to_contain_text("changed")
        await expect(rows.filter(has_text="preferred_hour")).to_contain_text("the same")
        await visitor.assert_sound()
        await visitor.page.get_by_role("link", name="Back to the user").click()
        await expect(feature(visitor, "tip_volume_30d")).to_contain_text("the same")
    (entry,) = await newest_entries(site.service.audit_trail, 1)
    assert (entry.action, entry.outcome) == ("rebuild", "done")


async def test_one_feature_is_rebuilt_by_its_button(own_site: Live, browser: Browser) -> None:
    site, user = own_site, new_user()
    await site.send(served(user, site.now_ms))
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        await visitor.page.get_by_role("button", name="Rebuild tip_volume_30d").click()
        rows = visitor.page.locator("tbody tr")
        await expect(rows).to_have_count(1)
        for said in ("tip_volume_30d", "nothing", "new"):
            await expect(rows).to_contain_text(said)
        await visitor.page.get_by_role("link", name="Back to the user").click()
        await expect(feature(visitor, "tip_volume_30d")).to_contain_text("fresh")
        await expect(feature(visitor, "preferred_hour")).to_contain_text("missing")
    (entry,) = await newest_entries(site.service.audit_trail, 1)
    assert (entry.action, entry.outcome) == ("rebuild", "done: tip_volume_30d")


async def test_user_is_erased_when_the_id_is_typed(
    own_site: Live, browser: Browser, cache_server: EmbeddedServer
) -> None:
    site, user = own_site, new_user("ex  tra")
    sent: list[TipEvent] = [served(user, site.now_ms), served(user, site.now_ms), feedback(user, site.now_ms)]
    await site.send(*sent)
    await site.features(user)
    await site.filled()
    tip = {"id": "tip", "features": {"is_overdue": True, "task_age_days": 1, "priority": 1}}
    assert (await site.client.post("/score", json={"user_id": user, "candidates": [tip]})).status_code == 200
    async with visiting(browser, site) as visitor:
        await visitor.go(address(user))
        await visitor.page.get_by_role("link", name="Erase this user").click()
        facts = visitor.page.locator("dl")
        for said in ("Tips served 2", "Reactions 1", "Decisions 1", "Learned state none", "Cached values 5"):
            await expect(facts).to_contain_text(said, use_inner_text=True)
        await visitor.assert_sound()
        confirm = visitor.page.get_by_label("type the user's id")
        button = visitor.page.get_by_role("button", name="Erase for good")
        await button.click()  # the browser wants the field filled
        for wrong in ("nobody", user.upper(), f" {user}"):
            await confirm.fill(wrong)
            await button.click()
            await expect(visitor.page.get_by_role("alert")).to_contain_text("Nothing was deleted")
            await expect(confirm).to_have_value("")
        await visitor.assert_sound()
        assert (await site.service.users.holdings(user)).events == 3
        await confirm.fill(user)
        await button.click()
        await expect(visitor.page.get_by_role("status")).to_contain_text("3 events were deleted")
        hashed = "user-sha256:" + hashlib.sha256(user.encode()).hexdigest()
        await visitor.expect_text(hashed)
        await expect(facts).to_contain_text("Decisions 1 deleted", use_inner_text=True)
        await visitor.assert_sound()
        for name in ("Go to the overview", "See the audit trail"):
            await expect(visitor.page.get_by_role("link", name=name)).to_be_visible()
        await visitor.go(address(user))
        assert "No event of this user is stored." in await visitor.text()
    assert (await site.service.users.holdings(user)).events == 0
    assert not [key for key in cached_keys(cache_server, "*") if b"ex%20%20tra" in key]
    (entry,) = await newest_entries(site.service.audit_trail, 2)
    assert (entry.action, entry.subject, entry.outcome) == ("erase", hashed, "done, 3 events")
    assert user not in repr(entry)


async def test_nothing_is_changed_when_the_token_is_wrong(keyed: Live, browser: Browser) -> None:
    user = new_user()
    await keyed.client.post("/events", json=[], headers=as_caller("admin"))
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        for part, button in (("", "Rebuild all"), ("/erase", "Erase for good")):
            await visitor.go(address(user, part))
            for field in await visitor.page.locator("main input[name=csrf_token]").all():
                await field.evaluate("field => { field.value = 'forged'; }")
            if part:
                await visitor.page.get_by_label("type the user's id").fill(user)
            await visitor.page.get_by_role("button", name=button).click()
            await expect(visitor.page.get_by_role("heading", level=1)).to_have_text("Forbidden")
    hashed = "user-sha256:" + hashlib.sha256(user.encode()).hexdigest()
    assert hashed not in {entry.subject for entry in await newest_entries(keyed.service.audit_trail, 20)}
