"""Sign-in, sign-out, refused requests, and the token of every form."""

from __future__ import annotations

import httpx
import pytest
from playwright.async_api import Browser, expect

from app.api.admin.sign_in import safe_next
from app.api.auth.forms import MEDIA_TYPE
from app.errors import StoreUnavailable
from tests.support.browser import visiting
from tests.support.live import API_KEYS, KEYS, Live, as_caller, problem
from tests.support.site import ServeSite

HTML = {"Accept": "text/html"}


async def test_sign_in_leads_back_to_the_requested_page(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.page.goto(f"{keyed.url}/admin/users/ada%3Fb?")
        await expect(visitor.page).to_have_url(f"{keyed.url}/admin/sign-in?next=%2Fadmin%2Fusers%2Fada%253Fb")
        await visitor.assert_sound()
        await visitor.page.get_by_label("API key").fill(KEYS["admin"])
        await visitor.page.keyboard.press("Enter")
        await expect(visitor.page).to_have_url(f"{keyed.url}/admin/users/ada%3Fb")
        (cookie,) = await visitor.context.cookies()
        assert cookie["name"] == keyed.cookie_name
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Lax"
        assert cookie["path"] == "/admin"
        assert KEYS["admin"] not in cookie["value"]


@pytest.mark.parametrize(("key", "reason"), [("stranger", "not known"), ("reader", "lacks the scope")])
async def test_sign_in_is_refused_when_the_key_lacks_admin(
    keyed: Live, browser: Browser, key: str, reason: str
) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS[key])
        await expect(visitor.page.get_by_role("alert")).to_contain_text(reason)
        await visitor.assert_sound()
        assert KEYS[key] not in await visitor.page.content()
        await visitor.page.goto(f"{keyed.url}/admin/users/ada")
        await expect(visitor.page.get_by_role("heading", name="Sign in")).to_be_visible()


async def test_every_page_names_the_key_of_the_session(keyed: Live) -> None:
    cookie = {"Cookie": f"{keyed.cookie_name}={await session_cookie(keyed)}"}
    for path in ("/admin/features", "/admin/nowhere"):
        page = await keyed.client.get(path, headers={**cookie, **HTML})
        assert 'you signed in with">admin<' in page.text


async def test_session_is_invalid_after_signing_out(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        (cookie,) = await visitor.context.cookies()
        stolen = {"Cookie": f"{keyed.cookie_name}={cookie['value']}"}
        assert (await keyed.client.get("/admin/users/ada", headers=stolen)).status_code == 200
        await visitor.page.get_by_role("button", name="Sign out").click()
        await expect(visitor.page.get_by_role("status")).to_have_text("You have signed out.")
        problem(await keyed.client.get("/admin/users/ada", headers=stolen), 401)


async def test_page_explains_that_no_key_is_needed(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin/sign-in")
        assert "Signing in is not needed" in await visitor.text()
        await visitor.assert_sound()


async def test_error_is_a_page_for_browsers_only(site: Live, browser: Browser) -> None:
    async with visiting(browser, site) as visitor:
        await visitor.go("/admin/nowhere", 404)
        await visitor.assert_sound()
        assert "No page or route has this path" in await visitor.text()
    problem(await site.client.get("/admin/nowhere"), 404)
    problem(await site.client.get("/nowhere", headers=HTML), 404)


async def test_page_is_served_when_accept_is_malformed(site: Live) -> None:
    for accept in ("text/html;q=inf", "text/html;q=1e999", "text/html;q=nan", ";,/;=", ""):
        for path, status in (("/admin/features", 200), ("/admin/nowhere", 404)):
            answer = await site.client.get(path, headers={"Accept": accept})
            assert answer.status_code == status, accept
            assert answer.headers["x-request-id"]


async def test_form_is_refused_when_it_has_no_token(keyed: Live, site: Live) -> None:
    (letter,) = await site.service.dead_letters.bury_payloads([("1", "no event")], site.now_ms)
    for path in (
        *("/admin/users/ada/rebuild", "/admin/users/ada/erase/confirm", "/admin/sign-in", "/admin/rebuilds"),
        *("/admin/features/preferred_hour/disable", "/admin/rebuilds/nope/cancel", "/admin/rollout/rollback"),
        "/admin/data-quality/refresh",
        *(f"/admin/dead-letters/{action}" for action in ("replay", f"{letter}/replay", f"{letter}/discard")),
    ):
        for token in ("", "csrf_token=", "csrf_token=" + "0" * 64, "csrf_token=%C3%A9"):
            content = f"{token}&scope=all&reason=x"
            body = problem(await site.client.post(path, content=content, headers={"Content-Type": MEDIA_TYPE}), 403)
            assert "reload the page" in body["detail"], path
    signed_in = {"Cookie": f"{keyed.cookie_name}={await session_cookie(keyed)}"}
    problem(await keyed.client.post("/admin/users/ada/rebuild", headers=signed_in), 403)
    problem(await keyed.client.delete("/admin/users/ada", headers=signed_in), 403)
    assert (await keyed.client.post("/admin/users/ada/rebuild", headers=as_caller("admin"))).status_code == 200


async def session_cookie(keyed: Live) -> str:
    """Sign in as an admin. The client is shared, so the cookies of other tests are deleted first."""
    keyed.client.cookies.clear()
    first = await keyed.client.get("/admin/sign-in", headers=HTML)
    token = token_in(first)
    cookies = {"Cookie": f"{keyed.cookie_name}={first.cookies[keyed.cookie_name]}"}
    keyed.client.cookies.clear()
    answer = await keyed.client.post(
        "/admin/sign-in", data={"csrf_token": token, "key": KEYS["admin"], "next": "/admin"}, headers=cookies
    )
    assert answer.status_code == 303
    keyed.client.cookies.clear()
    return str(answer.cookies[keyed.cookie_name])


async def test_change_is_refused_when_another_site_sends_it(site: Live) -> None:
    for headers in (
        *({"Sec-Fetch-Site": value} for value in ("cross-site", "same-site")),
        *({"Origin": value} for value in ("http://elsewhere.example", "null", "http://[", "")),
        {"Origin": "null", "Host": ""},
    ):
        for method, url in (("POST", "/admin/users/ada/rebuild"), ("DELETE", "/admin/users/ada"), ("POST", "/events")):
            body = problem(await site.client.request(method, url, headers=headers), 403, headers)
            assert "another site" in body["detail"], headers
        assert (await site.client.get("/admin/users/ada", headers=headers)).status_code == 200, headers


async def test_session_stays_when_another_site_sends_a_form(keyed: Live, browser: Browser) -> None:
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["admin"])
        # To the browser `localhost` is another site than 127.0.0.1, and gets none of its cookies.
        elsewhere = keyed.url.replace("127.0.0.1", "localhost")
        page = f'<form action="{keyed.url}/admin/users/ada/rebuild" method="post"></form>'
        await visitor.page.route(f"{elsewhere}/", lambda route: route.fulfill(body=page, content_type="text/html"))
        await visitor.page.goto(f"{elsewhere}/")
        await visitor.page.evaluate("document.forms[0].submit()")
        await expect(visitor.page.get_by_text("sent by a page of another site")).to_be_visible()
        await visitor.go("/admin/users/ada")
        await expect(visitor.page.get_by_role("button", name="Sign out")).to_be_visible()
        visitor.elsewhere.clear()


def test_next_page_is_the_overview_when_it_is_on_another_site() -> None:
    for path in ("https://a.example", "//a.example", "/adminx", "/admin\\x", "/admin/é", "/admin/\n", "", "/events"):
        assert safe_next(path) == "/admin", path
    for path in ("/admin/..", "/admin/../other", "/admin/%2E%2e/x", "/admin/.%2e#x", "/admin/./../x", "/admin/..?x"):
        assert safe_next(path) == "/admin", path
    for path in ("/admin/users/a%20b?x=1", "/admin/users/...", "/admin/users/..a", "/admin/audit?subject=/../"):
        assert safe_next(path) == path


async def test_sign_in_and_out_are_audited(keyed: Live, browser: Browser) -> None:
    async def entries() -> list[tuple[str, str, str]]:
        answer = await keyed.client.get("/admin/audit", headers=as_caller("admin"))
        return [
            (entry["actor"], entry["action"], entry["outcome"])
            for entry in answer.json()["entries"]
            if entry["action"].startswith("sign")
        ]

    before = len(await entries())
    async with visiting(browser, keyed) as visitor:
        await visitor.sign_in(KEYS["stranger"])
        await visitor.sign_in(KEYS["writer"])
        await visitor.sign_in(KEYS["admin"])
        await visitor.page.get_by_role("button", name="Sign out").click()
        await expect(visitor.page.get_by_role("status")).to_be_visible()
    found = await entries()
    assert found[: len(found) - before] == [
        ("admin", "sign out", "done"),
        ("admin", "sign in", "done"),
        ("writer", "sign in", "refused: key 'writer' lacks the scope admin"),
    ]


async def test_sign_in_is_refused_when_it_cannot_be_audited(
    serve_site: ServeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object) -> int:
        raise StoreUnavailable("the disk is full")

    async with serve_site(api_keys=API_KEYS) as site:
        signed_in = await session_cookie(site)
        cookie = {"Cookie": f"{site.cookie_name}={signed_in}"}
        token = token_in(await site.client.get("/admin/features", headers={**cookie, **HTML}))
        fresh = await site.client.get("/admin/sign-in", headers=HTML)
        form = {"csrf_token": token_in(fresh), "key": KEYS["admin"]}
        monkeypatch.setattr(site.service.audit_trail, "begin", fails)
        # The client brings the cookie of the page that it has just seen.
        refused = await site.client.post("/admin/sign-in", data=form, headers=HTML)
        assert refused.status_code == 503
        assert site.cookie_name not in refused.cookies
        site.client.cookies.clear()
        problem(await site.client.post("/admin/sign-out", data={"csrf_token": token}, headers=cookie), 503)
        assert (await site.client.get("/admin/users/ada", headers=cookie)).status_code == 200


def token_in(page: httpx.Response) -> str:
    return page.text.partition('name="csrf_token" value="')[2].partition('"')[0]
