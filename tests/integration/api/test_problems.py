"""Every error is a problem detail: bad targets, methods that are not there, defects."""

from __future__ import annotations

import re

import pytest

from app.profiles.online.reader import ProfileReader
from tests.support.live import Live, new_user, problem, raw_status


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"/profiles/.", 422),
        (b"/profiles/..", 422),
        (b"/profiles/%2e", 422),
        (b"/profiles/%2E%2e", 422),
        (b"/profiles/../features", 404),
        (b"/profiles/a%2Fb", 422),
        (b"/profiles/a%2fb", 422),
        (b"/profiles/a/b", 404),
        (b"/profiles/%FF", 400),
        (b"/profiles/%C3%28", 400),
        (b"/profiles/%ED%A0%80", 400),
        (b"/profiles/%C0%AF", 400),
        (b"/profiles/%", 400),
        (b"/profiles/%zz", 400),
        (b"/profiles/%u0041", 400),
        (b"/profiles/%00", 422),
        (b"/profiles/%0a", 422),
        (b"/profiles/%7f", 422),
        (b"/profiles/%C2%85", 422),
        (b"/profiles/" + b"x" * 129, 422),
        (b"/profiles/" + b"%C3%A9" * 129, 422),
        (b"/profiles/" + b"x" * 5_000, 422),
        (b"/profiles/", 404),
        (b"/profiles", 404),
        (b"//", 404),
        (b"//profiles/u", 404),
        (b"/profiles//u", 404),
        (b"/profiles//", 404),
        (b"/", 404),
        (b"/nothing", 404),
        (b"/favicon.ico", 404),
        (b"/schema/nothing", 404),
        (b"/schema/assets/nothing.js", 404),
        (b"/schema/assets/../../../../etc/passwd", 404),
        (b"/schema/assets/%2e%2e/%2e%2e/litestar_offline_docs/__init__.py", 404),
        (b"/profiles/u?features=%FF", 400),
        (b"/profiles/u?features=%", 400),
        (b"/profiles/u?%FF=1", 400),
        (b"/features?features=preferred_hour", 400),
        (b"/healthz?x=1", 400),
        (b"/metrics?x", 400),
        (b"/admin/users/u?detail=true", 400),
        (b"/schema?x=1", 400),
    ],
)
async def test_request_is_refused_when_its_target_is_bad(site: Live, target: bytes, status: int) -> None:
    found, body = await raw_status(site, target)
    assert (found, body["status"]) == (status, status)


@pytest.mark.parametrize(
    ("target", "user"),
    [
        (b"/profiles/a%20b", "a b"),
        (b"/profiles/a+b", "a+b"),
        (b"/profiles/a%25b", "a%b"),
        (b"/profiles/a%252Fb", "a%2Fb"),
        (b"/profiles/a%3Fb", "a?b"),
        (b"/profiles/%F0%9F%8E%AF", "🎯"),
        ("/profiles/é".encode(), "é"),
        (b"/profiles/" + b"%C3%A9" * 128, "é" * 128),
        (b"/profiles/...", "..."),
        (b"/profiles/u/", "u"),
    ],
)
async def test_id_is_decoded_once_when_it_stands_in_a_path(site: Live, target: bytes, user: str) -> None:
    status, body = await raw_status(site, target)
    assert (status, body["user_id"]) == (200, user)


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "POST", "TRACE", "BREW"])
async def test_method_is_refused_naming_those_allowed(site: Live, method: str) -> None:
    answer = await site.client.request(method, "/profiles/u")
    assert answer.status_code == 405
    assert {word.strip() for word in answer.headers["allow"].split(",")} == {"GET", "HEAD", "OPTIONS"}
    problem(answer, 405)


async def test_allowed_methods_are_told_when_asked_for(site: Live) -> None:
    answer = await site.client.options("/events")
    assert answer.status_code == 204
    assert {word.strip() for word in answer.headers["allow"].split(",")} == {"POST", "OPTIONS"}


async def test_all_allowed_methods_are_told_when_several_handlers_share_a_path(site: Live) -> None:
    answer = await site.client.options("/admin/dead-letters/1")
    assert answer.status_code == 204
    assert answer.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"


async def test_methods_that_no_document_names_are_not_told_where_others_are(site: Live) -> None:
    document = (await site.client.get("/schema/openapi.json")).json()
    for path, methods in document["paths"].items():
        named = {word.upper() for word in methods if word in ("get", "post", "delete", "put", "patch")}
        expected = named | {"OPTIONS"} | ({"HEAD"} if "GET" in named else set())
        plain = re.sub(r"\{[a-z_]*\}", "1", path)
        for answer in (await site.client.options(plain), await site.client.request("PUT", plain)):
            assert set(answer.headers["allow"].split(", ")) == expected, path


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/schema", "/schema/openapi.json", "/features",
                                  "/profiles/u", "/admin", "/admin/users/u", "/admin/static/user.css"])  # fmt: skip
async def test_head_answers_as_get_does_without_the_body(site: Live, path: str) -> None:
    got, head = await site.client.get(path), await site.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers.keys() == got.headers.keys()
    assert head.headers["content-type"] == got.headers["content-type"]


async def test_head_is_refused_where_get_is(site: Live) -> None:
    assert (await site.client.head("/events")).status_code == 405
    assert (await site.client.head("/nowhere")).status_code == 404


async def test_defect_is_told_to_nobody_but_logged_when_a_route_fails(
    site: Live, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def read(*_: object) -> None:
        raise RuntimeError("the secret inside")

    monkeypatch.setattr(ProfileReader, "read", read)
    monkeypatch.setattr(ProfileReader, "read_shared_values", read)
    answer = await site.client.get(f"/profiles/{new_user()}", headers={"X-Request-Id": "broken-one"})
    body = problem(answer, 500)
    assert answer.headers["x-request-id"] == "broken-one"
    assert "secret" not in answer.text
    assert "errors" not in body
    logged = capfd.readouterr().err
    assert "RuntimeError: the secret inside" in logged
    assert "broken-one" in logged
    assert "Traceback" in logged
