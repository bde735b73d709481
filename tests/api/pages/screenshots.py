"""Pictures of the pages of a service that runs, for the README and for whoever changes a page.

`make screenshots` takes them of `make up`: every page, light and dark, wide and narrow, into `var/screenshots`. With
`ARGS=--readme` it takes the few that the README shows, into `tests/api/pages/pictures`.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Literal

from playwright.async_api import Browser

from tests.support.browser import NARROW, WIDE, Scheme, chromium

PICTURES = Path(__file__).parent / "pictures"
PAGES = {
    "overview": "/admin",
    "user": "/admin/users/user-0007",
    "erase": "/admin/users/user-0007/erase",
    "find": "/admin/users?prefix=user-00",
    "data-quality": "/admin/data-quality",
    "rebuilds": "/admin/rebuilds",
    "rollout": "/admin/rollout",
    "dead-letters": "/admin/dead-letters",
    "features": "/admin/features",
    "audit": "/admin/audit",
    "sign-in": "/admin/sign-in",
    "error": "/admin/nowhere",
}
# (page, scheme, height that is shown)
README: tuple[tuple[str, Scheme, int], ...] = (
    ("overview", "light", 1000),
    ("user", "dark", 1150),
    ("data-quality", "light", 1150),
)


async def shoot(
    browser: Browser, url: str, scheme: Scheme, width: int, target: Path, *, height: int | None = None
) -> None:
    """One page; whole, or its upper part of that height."""
    context = await browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height or 900})
    page = await context.new_page()
    await page.goto(url)
    await page.screenshot(path=target, full_page=height is None)
    await context.close()


async def main(url: str, *, readme: bool) -> None:
    """Take them."""
    directory = PICTURES if readme else Path("var/screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    async with chromium() as browser:
        if readme:
            for name, scheme, height in README:
                await shoot(browser, url + PAGES[name], scheme, WIDE, directory / f"{name}.png", height=height)
            return
        for name, path in PAGES.items():
            for scheme in schemes:
                for width in (WIDE, NARROW):
                    await shoot(browser, url + path, scheme, width, directory / f"{name}-{scheme}-{width}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--readme", action="store_true", help="only those that the README shows")
    asked = parser.parse_args()
    asyncio.run(main(asked.url, readme=asked.readme))
