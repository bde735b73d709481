"""The catalogue of features, as JSON and as a page."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser, expect

from app.features.export import FORMATS
from tests.support.browser import NARROW, visiting
from tests.support.live import Live
from tests.support.registry import REGISTRY, ProfileFeatures

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_catalogue_tells_each_definition_whole(site: Live) -> None:
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


@pytest.mark.parametrize("width", [NARROW, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_catalogue_is_a_sound_page(site: Live, browser: Browser, scheme: str, width: int) -> None:
    async with visiting(browser, site, scheme=scheme, width=width) as visitor:  # type: ignore[arg-type]
        await visitor.go("/admin/features")
        for summary in await visitor.page.locator("summary").all():
            await summary.click()
        await visitor.assert_sound()
        graph = visitor.page.locator("svg.graph")
        assert await graph.locator("path.edge").count() == sum(len(entry.invalidated_by) for entry in REGISTRY)
        await expect(graph).to_have_accessible_name(
            "signals.tip.served invalidates tip_volume_30d. signals.tip.feedback invalidates completion_rate_30d, "
            "dismiss_rate_30d, mean_dwell_ms_30d, preferred_hour."
        )


async def test_table_is_sorted_when_a_heading_is_pressed_with_the_keyboard(site: Live, browser: Browser) -> None:
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


async def test_catalogue_can_be_read_when_there_is_no_javascript(site: Live, browser: Browser) -> None:
    async with visiting(browser, site, scripts=False) as visitor:
        await visitor.go("/admin/features")
        await expect(visitor.page.locator("#preferred_hour pre")).to_contain_text("ROW_NUMBER()")
