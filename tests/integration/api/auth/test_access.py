"""Access to every route without a key, with a wrong key, with a key of each scope, and with a session."""

from __future__ import annotations

from typing import NamedTuple

import httpx
import pytest
import pytest_asyncio
from litestar.routes import HTTPRoute

from app.api.auth.sessions import NOT_SIGNED_IN
from app.settings import hash_key
from app.settings.parsers import ApiKey
from tests.support.live import KEYS, Live, as_caller, problem
from tests.support.raw_http import exchange
from tests.support.site import ServeSite


class Access(NamedTuple):
    """A request, the scope it needs (None: none), and its status with that scope."""

    method: str
    route: str
    path: str
    scope: str | None
    status: int


# Bodies are left out, so a request that gets past the guards and needs one is a 400.
TABLE = [
    Access("GET", "/profiles/{user_id:str}", "/profiles/u", "read", 200),
    Access("GET", "/profiles/{user_id:str}/detail", "/profiles/u/detail", "read", 200),
    Access("POST", "/profiles/batch", "/profiles/batch", "read", 400),
    Access("POST", "/profiles/history", "/profiles/history", "read", 400),
    Access("GET", "/features", "/features", "read", 200),
    Access("POST", "/events", "/events", "write", 400),
    Access("POST", "/score", "/score", "read", 400),
    Access("GET", "/decisions/{decision_id:str}", "/decisions/nope", "read", 404),
    Access("GET", "/decisions", "/decisions", "admin", 200),
    Access("POST", "/generate", "/generate", "read", 400),
    Access("GET", "/admin", "/admin", "admin", 200),
    Access("GET", "/admin/users", "/admin/users", "admin", 200),
    Access("GET", "/admin/users/{user_id:str}", "/admin/users/u", "admin", 200),
    Access("DELETE", "/admin/users/{user_id:str}", "/admin/users/u", "admin", 204),
    Access("POST", "/admin/users/{user_id:str}/rebuild", "/admin/users/u/rebuild", "admin", 200),
    Access("GET", "/admin/users/{user_id:str}/development", "/admin/users/u/development", "admin", 200),
    Access("GET", "/admin/users/{user_id:str}/erase", "/admin/users/u/erase", "admin", 200),
    Access("POST", "/admin/users/{user_id:str}/erase/confirm", "/admin/users/u/erase/confirm", "admin", 415),
    Access("GET", "/admin/data-quality", "/admin/data-quality", "admin", 200),
    Access("POST", "/admin/data-quality/refresh", "/admin/data-quality/refresh", "admin", 202),
    Access("GET", "/admin/data-quality/refresh", "/admin/data-quality/refresh", "admin", 200),
    Access("GET", "/admin/data-quality/users", "/admin/data-quality/users", "admin", 400),
    Access("GET", "/admin/dead-letters", "/admin/dead-letters", "admin", 200),
    Access("POST", "/admin/dead-letters/replay", "/admin/dead-letters/replay?after=9223372036854775807", "admin", 200),
    Access("GET", "/admin/dead-letters/{letter_id:int}", "/admin/dead-letters/999999999", "admin", 404),
    Access("POST", "/admin/dead-letters/{letter_id:int}/replay", "/admin/dead-letters/999999999/replay", "admin", 404),
    Access(
        "POST", "/admin/dead-letters/{letter_id:int}/discard", "/admin/dead-letters/999999999/discard", "admin", 415
    ),
    Access("DELETE", "/admin/dead-letters/{letter_id:int}", "/admin/dead-letters/999999999", "admin", 404),
    Access("GET", "/admin/rebuilds", "/admin/rebuilds", "admin", 200),
    Access("POST", "/admin/rebuilds", "/admin/rebuilds", "admin", 400),
    Access("GET", "/admin/rebuilds/{run_id:str}", "/admin/rebuilds/nope", "admin", 404),
    Access("DELETE", "/admin/rebuilds/{run_id:str}", "/admin/rebuilds/nope", "admin", 404),
    Access("POST", "/admin/rebuilds/{run_id:str}/cancel", "/admin/rebuilds/nope/cancel", "admin", 415),
    Access("GET", "/admin/decisions", "/admin/decisions", "admin", 200),
    Access("GET", "/admin/decisions/{decision_id:str}", "/admin/decisions/nope", "admin", 404),
    Access("GET", "/admin/rollout", "/admin/rollout", "admin", 200),
    Access("POST", "/admin/rollout/ramp", "/admin/rollout/ramp", "admin", 409),
    Access("POST", "/admin/rollout/promote", "/admin/rollout/promote", "admin", 409),
    # With an unknown parameter, because a valid request would roll back.
    Access("POST", "/admin/rollout/rollback", "/admin/rollout/rollback?why=complaints", "admin", 400),
    Access("GET", "/admin/keys", "/admin/keys", "admin", 200),
    Access("GET", "/admin/audit", "/admin/audit", "admin", 200),
    Access("GET", "/admin/features", "/admin/features", "admin", 200),
    Access("POST", "/admin/features/{name:str}/disable", "/admin/features/nope/disable", "admin", 404),
    Access("POST", "/admin/features/{name:str}/enable", "/admin/features/nope/enable", "admin", 404),
    Access("GET", "/admin/sign-in", "/admin/sign-in", None, 200),
    Access("POST", "/admin/sign-in", "/admin/sign-in", None, 415),
    Access("POST", "/admin/sign-out", "/admin/sign-out", "admin", 303),
    Access("GET", "/admin/static/{file_path:path}", "/admin/static/pages.css", None, 200),
    Access("HEAD", "/admin/static/{file_path:path}", "/admin/static/pages.css", None, 200),
    Access("GET", "/healthz", "/healthz", None, 200),
    Access("GET", "/readyz", "/readyz", None, 200),
    Access("GET", "/metrics", "/metrics", None, 200),
    Access("GET", "/schema", "/schema", None, 200),
    Access("GET", "/schema/openapi.json", "/schema/openapi.json", None, 200),
    Access("GET", "/schema/assets/{file_path:path}", "/schema/assets/swagger-ui.css", None, 200),
    Access("HEAD", "/schema/assets/{file_path:path}", "/schema/assets/swagger-ui.css", None, 200),
]
SCOPES = {"reader": {"read"}, "writer": {"write"}, "admin": {"read", "write", "admin"}}


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def refresh_is_queued(site: Live, keyed: Live) -> None:
    for served in (site, keyed):
        assert (await served.client.post("/admin/data-quality/refresh", headers=as_caller("admin"))).status_code == 202


async def test_table_names_every_route_of_the_application(keyed: Live) -> None:
    served = {
        (method, route.path)
        for route in keyed.app.routes
        if isinstance(route, HTTPRoute)
        for method in route.methods
        if method != "OPTIONS"  # returns only the allowed methods
    }
    assert served == {(access.method, access.route) for access in TABLE}
    assert all(isinstance(route, HTTPRoute) for route in keyed.app.routes)


@pytest.mark.slow
async def test_access_is_as_the_table_says(keyed: Live) -> None:
    odd: tuple[dict[str, str], ...] = ({"X-API-Key": ""}, {"X-API-Key": "x" * 8_000})
    for access in TABLE:
        for headers in ({}, as_caller("stranger"), *(odd if access.path in ("/profiles/u", "/admin") else ())):
            answer = await keyed.client.request(access.method, access.path, headers=headers)
            if access.scope is None:
                assert answer.status_code == access.status, access
            else:
                problem(answer, 401)
                assert answer.headers["www-authenticate"] == 'ApiKey realm="profiles"', access
        for caller, scopes in SCOPES.items():
            answer = await keyed.client.request(access.method, access.path, headers=as_caller(caller))
            if access.scope is None or access.scope in scopes:
                assert answer.status_code == access.status, (access, caller)
            else:
                assert access.scope in problem(answer, 403)["detail"], (access, caller)


@pytest.mark.slow
async def test_every_request_is_allowed_when_no_key_is_configured(site: Live) -> None:
    for access in TABLE:
        for headers in ({}, as_caller("stranger")):
            answer = await site.client.request(access.method, access.path, headers=headers)
            assert answer.status_code == access.status, access


async def visit(site: Live, key_name: str) -> tuple[dict[str, str], str]:
    """The header with a session's cookie, and the token of its forms."""
    sessions = site.app.state.sessions
    session = sessions.begin(key_name)
    return {"Cookie": f"{sessions.cookie_name}={await sessions.cookie(session)}"}, await sessions.form_token(session)


@pytest.mark.slow
async def test_session_needs_its_token_for_changes_and_opens_admin_routes_only(keyed: Live) -> None:
    async def ask(access: Access, headers: dict[str, str]) -> httpx.Response:
        keyed.client.cookies.clear()
        return await keyed.client.request(access.method, access.path, headers=headers)

    for access in TABLE:
        cookie, token = await visit(keyed, "admin")
        answer = await ask(access, cookie)
        if access.scope is None:
            # A signed-in user is redirected from the sign-in page, and can send its form only with the token.
            expected = {"GET": 303, "POST": 403}[access.method] if access.path == "/admin/sign-in" else access.status
            assert answer.status_code == expected, access
            continue
        if access.scope != "admin":
            problem(answer, 401)
        elif access.method == "GET":
            assert answer.status_code == access.status, access
        else:
            assert "reload the page" in problem(answer, 403)["detail"], access
            _, token_of_another = await visit(keyed, "admin")
            problem(await ask(access, {**cookie, "X-CSRF-Token": token_of_another}), 403)
            answer = await ask(access, {**cookie, "X-CSRF-Token": token})
            assert answer.status_code == access.status, access
        problem(await ask(access, (await visit(keyed, NOT_SIGNED_IN))[0]), 401)
        problem(await ask(access, {"Cookie": cookie["Cookie"][:-2]}), 401)
        if access.scope == "admin":  # a key in the request takes precedence over the session
            problem(await ask(access, {**cookie, **as_caller("reader")}), 403)


NAMES = ["rebound.example", "rebound.example:8000", "127.0.0.1.rebound.example", "localhost.example", "localhost."]
ADDRESSES = ["[::2]:8000", "192.0.2.1", "0.0.0.0", "0", "127.1", "2130706433", "0x7f000001"]  # noqa: S104  # not bound
MALFORMED = ["[", "[::1", "localhost@rebound.example"]


@pytest.mark.slow
async def test_keyless_site_is_closed_when_the_host_is_foreign(site: Live, keyed: Live) -> None:
    for access in TABLE:
        for host in (NAMES[0], ADDRESSES[0], MALFORMED[0]) if access.scope is not None else ():
            headers = {"Host": host, "Origin": f"http://{host}"}
            problem(await site.client.request(access.method, access.path, headers=headers), 403, host)
    for host in (*NAMES, *ADDRESSES, *MALFORMED):
        headers = {"Host": host, "Origin": f"http://{host}"}
        problem(await site.client.get("/admin", headers=headers), 403, host)
        for path in ("/profiles/u", "/profiles/u?features=tip_volume_30d"):  # without an origin: the fast path
            problem(await site.client.get(path, headers={"Host": host}), 403, host)
        batch = {"user_ids": ["u"]}
        problem(await site.client.post("/profiles/batch", json=batch, headers={"Host": host}), 403, host)
        answer = await keyed.client.get("/profiles/u", headers={"Host": host, **as_caller("reader")})
        assert answer.status_code == 200, host


async def test_keyless_site_is_open_when_the_host_is_local(site: Live) -> None:
    for host in ("localhost", "LocalHost:1", "LOCALHOST", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000", ""):
        for path in ("/profiles/u", "/profiles/u?detail=true", "/admin/users"):
            assert (await site.client.get(path, headers={"Host": host})).status_code == 200, (host, path)


async def test_keyless_site_is_closed_when_target_or_host_is_foreign(site: Live) -> None:
    for target, host, status in (
        (b"http://localhost:8000/profiles/u", b"Host: rebound.example\r\n", 403),
        (b"http://rebound.example/profiles/u", b"Host: rebound.example\r\n", 403),
        (b"http://rebound.example/profiles/u", b"", 403),
        (b"http://localhost/profiles/u", b"", 200),
        (b"/profiles/u", b"Host: localhost\r\nHost: rebound.example\r\n", 400),
        (b"/profiles/u", b"Host: rebound.example\r\nHost: localhost\r\n", 400),
        (b"/profiles/u", b"Host: localhost\\@rebound.example\r\n", 400),
        (b"/profiles/u", b"Host: loc\xe4lhost\r\n", 400),
        (b"/profiles/u", b"Host: localhost,rebound.example\r\n", 403),
        (b"/profiles/u?detail=true", b"Host: localhost\r\nHost: rebound.example\r\n", 400),
    ):
        sent = b"GET " + target + b" HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n"
        assert (await exchange(site.port, sent)).statuses == [status], (target, host)


async def test_nothing_is_read_from_the_body_when_the_key_is_missing(keyed: Live) -> None:
    problem(await keyed.client.post("/events", content=b"nonsense"), 401)
    problem(await keyed.client.get("/profiles/u?nope=1"), 401)


async def test_key_is_refused_when_it_is_nearly_right_or_a_hash(keyed: Live) -> None:
    reader, hashed = KEYS["reader"], hash_key(KEYS["admin"]).hex()
    for key in (reader.upper(), reader + " x", reader[:-1], "é", hashed, hashed.upper()):
        problem(await keyed.client.get("/features", headers=[(b"X-API-Key", key.encode())]), 401, key)


async def test_key_has_every_scope_it_names(serve_site: ServeSite) -> None:
    both = ApiKey("both", frozenset({"read", "write"}), hash_key("both-of-them"))
    async with serve_site(api_keys=(both,)) as site:
        headers = {"X-API-Key": "both-of-them"}
        assert (await site.client.get("/features", headers=headers)).status_code == 200
        problem(await site.client.post("/events", headers=headers), 400)
        problem(await site.client.get("/admin/rebuilds", headers=headers), 403)
