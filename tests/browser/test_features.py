"""The catalogue of features, as JSON and as a page."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from app.bootstrap.engines import load_contract
from app.features.export import FORMATS
from tests.support.audit import newest_entries
from tests.support.browser import Scheme, looks, visiting
from tests.support.events import served
from tests.support.features import ProfileFeatures
from tests.support.live import Live, live, new_user
from tests.support.registry import REGISTRY, own_entry, own_registry
from tests.support.site import ServeSite


async def test_catalogue_has_each_definition(site: Live) -> None:
    body = (await site.client.get("/admin/features")).json()
    assert [entry["name"] for entry in body["features"]] == list(REGISTRY.names)
    for entry, told in zip(REGISTRY, body["features"], strict=True):
        assert told["sql"].split() == entry.compute.split()
        assert told["window_s"] == entry.window.total_seconds()
        assert told["fingerprint"] == entry.fingerprint
        for subject, names in body["subjects"].items():
            assert (entry.name in names) == (subject in entry.invalidated_by)
    assert {export["format"]: export["text"] for export in body["exports"]} == {
        name: export(REGISTRY, ProfileFeatures) for name, export in FORMATS.items()
    }


@looks
async def test_catalogue_is_a_sound_page(site: Live, browser: Browser, scheme: Scheme, width: int) -> None:
    async with visiting(browser, site, scheme=scheme, width=width) as visitor:
        await visitor.go("/admin/features")
        for summary in await visitor.page.locator("summary").all():
            await summary.click()
        await visitor.assert_sound()
        await expect(visitor.page.locator("#preferred_hour pre")).to_contain_text("ROW_NUMBER()")
        graph = visitor.page.locator("svg.graph")
        assert await graph.locator("path.edge").count() == sum(len(entry.invalidated_by) for entry in REGISTRY)
        await expect(graph).to_have_accessible_name(re.compile("signals.tip.served invalidates tip_volume_30d"))


async def test_table_is_sorted_by_keyboard(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin/features")
        heading = visitor.page.get_by_role("columnheader", name="TTL")
        first = visitor.page.locator("tbody tr").first
        await heading.get_by_role("button").focus()
        await visitor.page.keyboard.press("Enter")
        await expect(heading).to_have_attribute("aria-sort", "ascending")
        await expect(first).to_contain_text("completion_rate_30d")
        await visitor.page.keyboard.press("Enter")
        await expect(heading).to_have_attribute("aria-sort", "descending")
        await expect(first).to_contain_text("preferred_hour")


TEXT = "SELECT user_id, MAX(tip_id) AS value FROM views GROUP BY user_id"


@looks
async def test_failing_and_disabled_features_show_the_reason(
    serve_site: ServeSite, browser: Browser, tmp_path: Path, scheme: Scheme, width: int
) -> None:
    entries = own_entry("seen", more="default=0,"), own_entry("off"), own_entry("bad", TEXT)
    async with serve_site(features=own_registry(tmp_path / "features.py", *entries)) as site:
        users = [new_user() for _ in range(3)]
        await site.send(*(served(user, site.now_ms) for user in users))
        await asyncio.gather(*(site.features(user) for user in users))
        await site.client.post("/admin/features/off/disable", json={"reason": "too slow <INC-12>"})
        async with visiting(browser, site, scheme=scheme, width=width) as visitor:
            await visitor.go("/admin/features")
            await visitor.page.locator("#bad summary", has_text="Disable").click()
            await visitor.page.locator("#off summary", has_text="Enable").click()
            await visitor.assert_sound()
            rows = await visitor.page.locator("table.features tbody tr").all_inner_texts()
            assert [row.split()[1] for row in rows] == ["ok", "disabled", "failing"]
            assert all("not measured: there were no users" in row for row in rows)
            await expect(visitor.page.locator("#bad .message")).to_contain_text("the SQL gave text where int")
            await expect(visitor.page.locator("#off .message")).to_contain_text(": too slow <INC-12>.")
            await expect(visitor.page.locator("#seen")).to_contain_text("int, 0 without events; over 30 d")
            await expect(visitor.page.locator("#seen")).to_contain_text("views, so signals.tip.served deletes")
            assert await visitor.page.locator("#seen .message").count() == 0


async def test_earlier_definitions_and_the_cost_are_shown(own_site: Live, browser: Browser, tmp_path: Path) -> None:
    await own_site.send(served(new_user(), own_site.now_ms))
    source = own_registry(tmp_path / "features.py", own_entry("tip_volume_30d", days=7))
    other = load_contract(own_site.service.settings, source).registry
    await own_site.service.registries.announce(other, own_site.now_ms - 86_400_000)
    async with live(own_site.service.settings) as site, visiting(browser, site) as visitor:
        await visitor.go("/admin/features")
        rows = visitor.page.locator("#tip_volume_30d table tbody tr")
        await expect(rows).to_have_count(2)
        known = REGISTRY.named("tip_volume_30d").fingerprint
        await expect(rows.nth(0)).to_contain_text(f"{known} current")
        await expect(rows.nth(1)).to_contain_text(other[0].fingerprint)
        await expect(rows.nth(1)).to_contain_text("1 d ago")
        await expect(rows.nth(1)).not_to_contain_text("current")
        await expect(visitor.page.locator("#tip_volume_30d dl")).to_contain_text("µs a user")


@pytest.mark.parametrize("scripts", [True, False])
async def test_feature_is_disabled_and_enabled_by_keyboard(own_site: Live, browser: Browser, scripts: bool) -> None:
    user = new_user()
    await own_site.send(served(user, own_site.now_ms))
    assert (await own_site.features(user))["tip_volume_30d"] == 1
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page, card = visitor.page, visitor.page.locator("#tip_volume_30d")

        async def press(label: str, reason: str, said: str) -> None:
            await card.locator("summary.button", has_text=label).focus()
            await page.keyboard.press("Enter")
            await page.keyboard.press("Tab")
            await page.keyboard.type(reason)
            await page.keyboard.press("Tab")
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("status")).to_have_text(said)

        await visitor.go("/admin/features")
        done = "tip_volume_30d is served as null, in every process within a second."
        await press("Disable", "wrong since noon", done)
        await expect(card.locator(".badge").first).to_have_text("disabled")
        await expect(card.locator(".message")).to_contain_text(": wrong since noon.")
        assert (await own_site.features(user))["tip_volume_30d"] is None
        await press("Enable", "mended", "tip_volume_30d is served again.")
        await expect(card.locator(".badge").first).to_have_text("ok")
        assert (await own_site.features(user))["tip_volume_30d"] == 1
        trail = [
            (item.action, item.subject, item.outcome) for item in await newest_entries(own_site.service.audit_trail, 2)
        ]
        assert trail == [
            ("enable feature", "tip_volume_30d", "enabled: mended"),
            ("disable feature", "tip_volume_30d", "disabled: wrong since noon"),
        ]


async def test_second_tab_changes_nothing(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/features")
        await own_site.client.post("/admin/features/preferred_hour/disable")
        await visitor.page.locator("#preferred_hour summary.button").click()
        await visitor.page.get_by_role("button", name="Disable preferred_hour").click()
        said = "Nothing was changed: preferred_hour is disabled already."
        await expect(visitor.page.get_by_role("status")).to_have_text(said)
