"""The page of the OpenAPI document: folded, light or dark as the reader's system, and without other sites."""

import re
import zlib

from playwright.async_api import Browser, Page, expect

from tests.support.browser import visiting
from tests.support.live import Live
from tests.support.pictures import chunks


async def brightness(page: Page, place: tuple[int, int]) -> int:
    """The red part of a pixel of the window, 0 to 255."""
    picture = await page.screenshot(clip={"x": place[0], "y": place[1], "width": 1, "height": 1})
    data = b"".join(data for kind, data in chunks(picture) if kind == b"IDAT")
    return zlib.decompress(data)[1]  # after the filter of the row


async def test_document_is_folded_and_in_the_scheme_of_the_reader(browser: Browser, site: Live) -> None:
    async with visiting(browser, site) as visitor:
        page = visitor.page
        await visitor.go("/schema")
        await expect(page.locator(".opblock-tag")).to_have_count(5)
        await expect(page.locator(".opblock")).to_have_count(0)
        await expect(page.locator(".model-container")).to_have_count(0)
        await page.locator("#operations-tag-Tips").click()
        operation = page.locator("#operations-Tips-post_score")
        await operation.get_by_text(re.compile("Rank candidate tips")).click()
        sample = operation.locator(".highlight-code").first
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            for place in ((3, 3), (3, 890)):
                assert (await brightness(page, place) < 60) is (scheme == "dark")
            await sample.scroll_into_view_if_needed()
            box = await sample.bounding_box()
            assert box is not None
            assert await brightness(page, (int(box["x"] + box["width"] / 2), int(box["y"] + 5))) < 100
