"""The static files of the pages."""

from app.api.openapi import ASSETS as DOCUMENTATION
from app.asgi import PAGES
from tests.support.live import Live, raw_status

ASSETS = "/admin/static"


async def test_every_file_is_served_with_its_type(site: Live) -> None:
    kinds = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
    for file in PAGES.iterdir():
        answer = await site.client.get(f"{ASSETS}/{file.name}", headers={"Accept": "text/html"})
        assert answer.content == file.read_bytes()
        assert answer.headers["content-type"] == kinds[file.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"


NAMES = [
    *b"%00 pages.css%00.js pages.css/x swagger-ui.css/x ../auth.py ..%5cauth.py %2e%2e/charts.py".split(),
    *b"%252e%252e/charts.py . .. %F0%9F%98%80".split(),
    *(b"", b"a" * 5_000),
]


async def test_file_is_not_found_when_its_name_is_unknown(site: Live) -> None:
    for place in (ASSETS, DOCUMENTATION):
        for name in NAMES:
            status, _ = await raw_status(site, place.encode() + b"/" + name)
            assert status == 404, (place, name[:50])
