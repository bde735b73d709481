"""A service behind a proxy: paths, and the address, scheme and host of the client."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import httpx
import pytest

from app.api.admin import sign_in as sign_in_module
from tests.support.clock import FakeClock
from tests.support.live import API_KEYS, KEYS, Live, as_caller, fresh_database, problem, raw_status, token_in
from tests.support.logs import Recorder
from tests.support.site import ServeSite

HTML = {"Accept": "text/html"}
LOOPBACK = (ip_network("127.0.0.0/8"),)
ELSEWHERE = (ip_network("10.0.0.0/8"),)
SAID = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "tips.example"}


async def sign_in(site: Live, headers: dict[str, str], root: str = "") -> httpx.Response:
    """Send the sign-in form as a browser behind a proxy does."""
    site.client.cookies.clear()
    page = await site.client.get(f"{root}/admin/sign-in", headers={**HTML, **headers})
    assert page.status_code == 200
    cookie = {"Cookie": f"{site.cookie_name}={page.cookies[site.cookie_name]}"}
    site.client.cookies.clear()
    form = {"csrf_token": token_in(page), "key": KEYS["admin"]}
    return await site.client.post(f"{root}/admin/sign-in", data=form, headers={**HTML, **cookie, **headers})


@pytest.mark.slow
@pytest.mark.parametrize(
    "root", [pytest.param("/tips", marks=pytest.mark.slow), "/profiles", pytest.param("/a/b", marks=pytest.mark.slow)]
)
async def test_route_is_found_with_and_without_the_root_path(serve_site: ServeSite, root: str) -> None:
    async with serve_site(root_path=root) as site:
        for prefix in ("", root):
            for path in ("/profiles/ada", "/profiles/a%20b", "/features", "/admin/users/ada", "/readyz", "/schema/"):
                answer = await site.client.get(prefix + path)
                assert answer.status_code in (200, 503 if path == "/readyz" else 200), prefix + path
            assert (await site.client.get(f"{prefix}/profiles/a%20b")).json()["user_id"] == "a b"
            batch = await site.client.post(f"{prefix}/profiles/batch", json={"user_ids": ["ada"]})
            assert batch.status_code == 200
        assert f"see {root}/schema" in problem(await site.client.get(f"{root}/nowhere/x"), 404)["detail"]
        problem(await site.client.get(f"{root}x/features"), 404)
        assert (await raw_status(site, f"{root}//features".encode()))[0] == 404
        assert (await raw_status(site, f"{root}/profiles/a%2Fb".encode()))[0] == 422
        document = (await site.client.get("/schema/openapi.json")).json()
        assert document["servers"] == [{"url": root}]


async def test_forwarded_prefix_decides_when_the_root_path_is_a_route(serve_site: ServeSite) -> None:
    stripped = {"X-Forwarded-Prefix": "/profiles", **as_caller("admin")}
    async with serve_site(root_path="/profiles", trusted_proxies=LOOPBACK, api_keys=API_KEYS) as site:
        assert (await site.client.get("/profiles/features", headers=as_caller("admin"))).json().keys() == {"features"}
        assert (await site.client.get("/profiles/features", headers=stripped)).json()["user_id"] == "features"
        assert (await site.client.get("/features", headers=stripped)).json().keys() == {"features"}
    async with serve_site(root_path="/profiles", trusted_proxies=ELSEWHERE, api_keys=API_KEYS) as site:
        assert (await site.client.get("/profiles/features", headers=stripped)).json().keys() == {"features"}


async def test_every_redirect_and_cookie_has_the_root_path(serve_site: ServeSite) -> None:
    async with serve_site(root_path="/tips", api_keys=API_KEYS) as site:
        away = await site.client.get("/tips/admin/users/ada?x=1", headers=HTML)
        assert away.headers["location"] == "/tips/admin/sign-in?next=%2Fadmin%2Fusers%2Fada%3Fx%3D1"
        signed_in = await sign_in(site, {}, "/tips")
        assert signed_in.status_code == 303
        assert signed_in.headers["location"] == "/tips/admin"
        assert "; Path=/tips/admin;" in signed_in.headers["set-cookie"]


async def test_forwarded_headers_count_when_the_proxy_is_trusted(serve_site: ServeSite) -> None:
    origin = {"Origin": "https://tips.example"}
    async with serve_site(trusted_proxies=LOOPBACK, api_keys=API_KEYS) as site:
        answer = await sign_in(site, {**SAID, **origin})
        assert answer.status_code == 303
        assert "; Secure" in answer.headers["set-cookie"]
        # Only the nearest proxy's value counts.
        forged = {**SAID, **origin, "X-Forwarded-Host": "elsewhere.example, tips.example"}
        assert (await sign_in(site, forged)).status_code == 303
        forged = {**SAID, **origin, "X-Forwarded-Host": "tips.example, elsewhere.example"}
        assert (await sign_in(site, forged)).status_code == 403
        empty = {**SAID, "X-Forwarded-Host": "", "Host": "tips.example", **origin}
        assert (await sign_in(site, empty)).status_code == 303


@pytest.mark.parametrize("trusted", [(), ELSEWHERE])
async def test_forwarded_headers_are_ignored_when_the_proxy_is_not_trusted(
    serve_site: ServeSite, trusted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(sign_in_module, "log", recorder)
    async with serve_site(trusted_proxies=trusted, api_keys=API_KEYS) as site:
        answer = await sign_in(site, SAID)
        assert answer.status_code == 303
        assert "Secure" not in answer.headers["set-cookie"]
        assert [(line["event"], line["setting"]) for line in recorder.lines] == [
            ("proxy_not_trusted", "PROFILES_TRUSTED_PROXIES")
        ]
        refused = await sign_in(site, {**SAID, "Origin": "https://tips.example"})
        assert refused.status_code == 403
        for advice in ("proxy_set_header Host $http_host", "X-Forwarded-Host", "PROFILES_TRUSTED_PROXIES"):
            assert advice in refused.text


async def test_clients_are_limited_separately_when_the_proxy_is_trusted(serve_site: ServeSite) -> None:
    def client(address: str) -> dict[str, str]:
        return {"X-Forwarded-For": f"198.51.100.9, {address}, 127.0.0.2"}

    async def statuses(site: Live, address: str) -> list[int]:
        asked = [await site.client.get("/features", headers=client(address)) for _ in range(2)]
        return [answer.status_code for answer in asked]

    limit = {"rate_limit": 1, "rate_burst": 1, "api_keys": API_KEYS}
    async with serve_site(trusted_proxies=LOOPBACK, clock=FakeClock(), **limit) as site:
        assert await statuses(site, "203.0.113.1") == [401, 429]
        assert await statuses(site, "203.0.113.2") == [401, 429]
    async with serve_site(clock=FakeClock(), **limit) as site:
        assert await statuses(site, "203.0.113.1") == [401, 429]
        assert await statuses(site, "203.0.113.2") == [429, 429]


async def test_sign_in_needs_an_origin_of_the_same_host(keyed: Live) -> None:
    for host, origin, status in (
        ("tips.example", "http://tips.example", 303),
        ("tips.example", "http://tips.example:8080", 303),  # nginx's `Host $host`
        ("tips.example:8080", "http://tips.example:8080", 303),
        ("[2001:db8::1]", "http://[2001:db8::1]:8080", 303),
        ("tips.example:8080", "http://tips.example:8081", 403),
        ("tips.example:8080", "http://tips.example", 403),
        ("tips.example", "http://elsewhere.example:8080", 403),
        ("127.0.0.1:8000", "http://tips.example:8080", 403),  # nginx's own default
        ("tips.example", "null", 403),
        ("", "null", 403),
    ):
        assert (await sign_in(keyed, {"Host": host, "Origin": origin})).status_code == status, (host, origin)


async def test_origin_needs_the_same_port_when_there_are_no_keys(site: Live) -> None:
    headers = {"Host": "127.0.0.1", "Origin": "http://127.0.0.1:9"}
    problem(await site.client.delete("/admin/users/ada", headers=headers), 403)


@pytest.mark.slow
async def test_services_on_one_host_do_not_sign_each_other_out(serve_site: ServeSite) -> None:
    async with serve_site(api_keys=API_KEYS) as one, serve_site(api_keys=API_KEYS) as other:
        jar = httpx.Cookies()
        for site in (one, other):
            jar.update((await sign_in(site, {})).cookies)
        cookies = {"Cookie": "; ".join(f"{name}={value}" for name, value in jar.items())}
        for site in (one, other):
            site.client.cookies.clear()
            assert (await site.client.get("/admin/users/ada", headers=cookies)).status_code == 200


async def test_session_is_valid_when_the_service_is_restarted(
    serve_site: ServeSite, migrated_template: Path, tmp_path: Path
) -> None:
    database = fresh_database(migrated_template, tmp_path)
    async with serve_site(database=database, api_keys=API_KEYS) as site:
        session = (await sign_in(site, {})).cookies[site.cookie_name]
    async with serve_site(database=database, api_keys=API_KEYS) as site:
        cookie = {"Cookie": f"{site.cookie_name}={session}"}
        assert (await site.client.get("/admin/users/ada", headers=cookie)).status_code == 200


async def test_refusal_names_the_setting_when_no_cookie_is_sent(keyed: Live) -> None:
    keyed.client.cookies.clear()
    page = await keyed.client.get("/admin/sign-in", headers=HTML)
    keyed.client.cookies.clear()
    form = {"csrf_token": token_in(page), "key": KEYS["admin"]}
    refused = problem(await keyed.client.post("/admin/sign-in", data=form), 403)
    assert "sent no session cookie" in refused["detail"]
    assert "PROFILES_ROOT_PATH" in refused["detail"]
