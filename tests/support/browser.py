"""A real Chromium for the tests of pages, and the checks for every page.

Playwright uses Debian's package; no browser is downloaded.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Response, async_playwright, expect

from tests.support.programs import required
from tests.support.waiting import PATIENCE_S

Scheme = Literal["light", "dark"]
WIDE, NARROW = 1280, 390
looks = pytest.mark.parametrize(("scheme", "width"), [("light", WIDE), ("dark", NARROW)])
_AXE = Axe()
# A browser trusts loopback addresses without TLS, but not these names.
NAMES = "*.test"


class Site(Protocol):
    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        ...


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=required("chromium", "chromium", "chromium-browser", "google-chrome"),
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--host-resolver-rules=MAP {NAMES} 127.0.0.1",
            ],
        )
        try:
            yield browser
        finally:
            await browser.close()


class Visitor:
    """A tab on one site that records errors, dialogs and requests to other sites."""

    def __init__(self, site: Site, context: BrowserContext, page: Page) -> None:
        self.site = site
        self.context = context
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))

    def _heard(self, message: ConsoleMessage) -> None:
        # The console also reports pages with an error status, which the test checks itself.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _asked(self, url: str) -> None:
        if not url.startswith((self.site.url, "data:", "about:")):
            self.elsewhere.append(url)

    async def go(self, path: str, status: int = 200) -> Response:
        """Open a page, and check its status."""
        answer = await self.page.goto(self.site.url + path)
        assert answer is not None
        assert answer.status == status, await answer.text()
        return answer

    async def text(self) -> str:
        """The text of the page."""
        return await self.page.locator("main").inner_text()

    async def expect_text(self, text: str) -> None:
        """Wait until the page has a text, for example after a click that leads to another page."""
        await expect(self.page.locator("main")).to_contain_text(text, use_inner_text=True)

    async def sign_in(self, key: str) -> None:
        """Sign in with a key, and wait for the next page: another navigation would cancel the request."""
        await self.page.goto(f"{self.site.url}/admin/sign-in")
        await self.page.get_by_label("API key").fill(key)
        async with self.page.expect_navigation():
            await self.page.get_by_role("button", name="Sign in").click()

    async def assert_accessible(self) -> None:
        """Check the page with axe."""
        results = await _AXE.run(self.page)
        assert results.violations_count == 0, results.generate_report()

    async def assert_sound(self) -> None:
        """Check that the page is accessible, has no errors or requests to other sites, and fits the window."""
        await self.assert_accessible()
        assert not self.complaints
        assert not self.elsewhere
        width, inner = await self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width <= inner, f"the page is {width} pixels wide in a window of {inner}"


@asynccontextmanager
async def visiting(
    browser: Browser,
    site: Site,
    *,
    scheme: Scheme = "light",
    width: int = WIDE,
    scripts: bool = True,
    zone: str = "UTC",
) -> AsyncIterator[Visitor]:
    """A visitor with a new profile. When the block ends, no error and no request to another site may be recorded."""
    context = await browser.new_context(
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
        java_script_enabled=scripts,
        locale="en-GB",
        timezone_id=zone,
        ignore_https_errors=True,  # for self-signed certificates of tests
    )
    context.set_default_timeout(1000 * PATIENCE_S)
    try:
        visitor = Visitor(site, context, await context.new_page())
        yield visitor
        assert not visitor.complaints
        assert not visitor.elsewhere
    finally:
        await context.close()
