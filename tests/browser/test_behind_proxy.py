"""The pages behind nginx, under another name and port, and under a path."""

from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Request, Response, expect

from tests.support.browser import Visitor, visiting
from tests.support.events import served
from tests.support.live import API_KEYS, KEYS, Live
from tests.support.nginx import nginx
from tests.support.processes import ROOT
from tests.support.readme import blocks_of
from tests.support.site import ServeSite

PAGES = (
    "/admin",
    "/admin/data-quality",
    "/admin/data-quality/users?feature=tip_volume_30d&state=missing",
    "/admin/rebuilds",
    "/admin/decisions",
    "/admin/rollout",
    "/admin/dead-letters",
    "/admin/features",
    "/admin/keys",
    "/admin/audit",
    "/admin/users?prefix=a",
    "/admin/users/ada",
    "/admin/users/ada/erase",
    "/admin/users/b%20c%3F",
    "/admin/sign-in",
)
# Addresses of this service in a page, wherever they stand.
ADDRESSES = """
[...document.querySelectorAll("*")].flatMap(
  (element) => [...element.attributes].filter(({ value }) => /^\\/[a-z]/.test(value)).map(({ value }) => value))
"""


@dataclass(frozen=True)
class Front:
    url: str


@dataclass(frozen=True)
class Arrangement:
    server: str
    root_path: str = ""
    trusted: bool = False
    tls: bool = False


def of_the_readme() -> str:
    (block,) = (block for block in blocks_of(ROOT / "docker/README.md") if block.language == "nginx")
    return block.code


ARRANGEMENTS = {
    "host without port": Arrangement("location / { proxy_pass http://127.0.0.1:8000; proxy_set_header Host $host; }"),
    "tls": Arrangement(of_the_readme().replace("/profiles/", "/"), trusted=True, tls=True),
    "path passed on, tls": Arrangement(of_the_readme(), "/profiles", trusted=True, tls=True),
    "path stripped that is one of the service's own": Arrangement(
        "location /profiles/ { proxy_pass http://127.0.0.1:8000/; proxy_set_header Host $host; }", "/profiles"
    ),
}


class Failures:
    """Responses with an error status, and requests that failed, of a page."""

    def __init__(self, visitor: Visitor) -> None:
        self.seen: list[str] = []
        visitor.page.on("response", self._came)
        visitor.page.on("requestfailed", self._broke)

    def _came(self, response: Response) -> None:
        if response.status >= 400:
            self.seen.append(f"{response.status} {response.url}")

    def _broke(self, request: Request) -> None:
        # Going on to another page ends what the last one still waits for.
        if request.failure != "net::ERR_ABORTED":
            self.seen.append(f"{request.failure} {request.url}")


@pytest.mark.parametrize("name", ARRANGEMENTS)
async def test_pages_work_behind_nginx(serve_site: ServeSite, browser: Browser, tmp_path: Path, name: str) -> None:
    arranged = ARRANGEMENTS[name]
    settings: dict[str, Any] = {"trusted_proxies": (ip_network("127.0.0.1"),)} if arranged.trusted else {}
    async with serve_site(api_keys=API_KEYS, root_path=arranged.root_path, **settings) as site:
        site.client.headers["X-API-Key"] = KEYS["admin"]
        await site.send(served("ada", site.now_ms), served("b c?", site.now_ms))
        server = arranged.server.replace(":8000", f":{site.port}")
        with nginx(tmp_path, server, tls=arranged.tls) as port:
            front = Front(f"{'https' if arranged.tls else 'http'}://tips.test:{port}{arranged.root_path}")
            async with visiting(browser, front) as visitor:
                failures = Failures(visitor)
                await sign_in(visitor, arranged)
                await open_every_page(visitor, arranged.root_path)
                await find_a_user(visitor)
                await follow_a_rebuild(visitor, site)
                await visitor.page.get_by_role("button", name="Sign out").click()
                await expect(visitor.page.get_by_role("status")).to_have_text("You have signed out.")
                assert not failures.seen


async def sign_in(visitor: Visitor, arranged: Arrangement) -> None:
    await visitor.page.goto(f"{visitor.site.url}/admin/users/b%20c%3F")
    await visitor.page.get_by_label("API key").fill(KEYS["admin"])
    await visitor.page.get_by_role("button", name="Sign in").click()
    await expect(visitor.page).to_have_url(f"{visitor.site.url}/admin/users/b%20c%3F")
    (cookie,) = await visitor.context.cookies()
    assert cookie["path"] == f"{arranged.root_path}/admin"
    assert cookie["secure"] == arranged.tls


async def open_every_page(visitor: Visitor, root: str) -> None:
    """Every address on every page lies under the root path."""
    for path in PAGES:
        await visitor.go(path)
        for address in await visitor.page.evaluate(ADDRESSES):
            assert address.startswith(f"{root}/"), f"{address} on {path}"
    await visitor.go("/schema")
    await expect(visitor.page.get_by_role("option", name=root or "/", exact=True)).to_be_attached()


async def find_a_user(visitor: Visitor) -> None:
    await visitor.go("/admin")
    await visitor.page.get_by_label("Find a user").press_sequentially("ad")
    await expect(visitor.page.locator("datalist option")).to_have_count(1)
    await visitor.page.get_by_role("button", name="Find").click()
    await visitor.page.get_by_role("link", name="ada").click()
    await visitor.page.get_by_role("button", name="Rebuild all features").click()
    await expect(visitor.page.get_by_role("heading", name="Rebuilt ada")).to_be_visible()


async def follow_a_rebuild(visitor: Visitor, site: Live) -> None:
    """The page polls the run under the address that the browser knows."""
    await visitor.go("/admin/rebuilds")
    await visitor.page.get_by_role("button", name="Start the rebuild").click()
    await expect(visitor.page.locator("[data-part=state]")).to_have_text("queued")
    run = visitor.page.url.rpartition("/")[2]
    await site.service.rebuild_runner.run(run, budget_s=30)
    await expect(visitor.page.locator("[data-part=state]")).to_have_text("completed")


async def test_overview_refreshes_itself_behind_nginx(serve_site: ServeSite, browser: Browser, tmp_path: Path) -> None:
    async with serve_site(root_path="/tips", api_keys=API_KEYS) as site:
        server = f"location /tips/ {{ proxy_pass http://127.0.0.1:{site.port}/; proxy_set_header Host $host; }}"
        with nginx(tmp_path, server) as port:
            async with visiting(browser, Front(f"http://tips.test:{port}/tips")) as visitor:
                await visitor.page.clock.install()
                await visitor.sign_in(KEYS["admin"])
                async with visitor.page.expect_response(f"{visitor.site.url}/admin") as answer:
                    await visitor.page.clock.fast_forward(10_000)
                assert (await answer.value).status == 200
                await expect(visitor.page.get_by_text("As of")).not_to_have_class("badge bad")
