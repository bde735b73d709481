"""Every error is a problem detail: invalid targets, unknown methods, defects."""

from __future__ import annotations

import gzip
import re

import pytest

from app.errors import StoreUnavailable
from app.features.clock import rfc3339
from app.profiles.online.reader import ProfileReader
from tests.support.live import JSON, Live, new_user, problem, raw_status

BAD_IDS = {
    400: b"% %4 %zz %u0041 %FF %C3%28 %C0%AF %C0%AE%C0%AE %ED%A0%80 %F4%90%80%80".split(),
    422: [
        *b". .. %2e %2e%2E a%2Fb a%2fb ..%2f..%2fetc%2fpasswd %00 %0a %0d%0aX:y %7f %C2%85".split(),
        *(b"x" * 129, b"%C3%A9" * 129, b"x" * 5_000),
    ],
}
BAD_PATHS = {
    404: (
        b"/ // /profiles /profiles/ /profiles// /profiles//u //profiles/u /profiles/a/b /profiles/../features "
        b"/PROFILES/u /profiles/../admin/users/u /nothing /favicon.ico /schema/nothing /schema/assets/nothing.js "
        b"/schema/assets/../../../../etc/passwd /schema/assets/%2e%2e/%2e%2e/litestar_offline_docs/__init__.py "
        b"/schema/assets/..%5c..%5cx /admin/static/%2e%2e/charts.py /admin/static//etc/passwd"
    ).split(),
    422: b"/profiles%2Fu /admin/users/%2E%2E /admin/users/%0A /admin/static/..%2fcharts.py".split(),
}
BAD_QUERIES = (
    b"/profiles/u?features=%FF /profiles/u?features=% /profiles/u?%FF=1 /profiles/u?%66eatures=nope "
    b"/profiles/u?features[]=a /profiles/u?features=tip_volume_30d&features=tip_volume_30d "
    b"/profiles/u?features=tip_volume_30d;detail=true /profiles/u?detail=2 /features?features=preferred_hour "
    b"/healthz?x=1 /metrics?x /admin/users/u?detail=true /schema?x=1"
).split()
DECODED = {
    b"a%20b": "a b",
    b"a+b": "a+b",
    b"a%25b": "a%b",
    b"a%252Fb": "a%2Fb",
    b"%2525": "%25",
    b"%76ictim": "victim",
    b"%56ictim": "Victim",
    b"a%C2%A0": "a\u00a0",
    b"a;x=y": "a;x=y",
    b"a%3Fdetail=true": "a?detail=true",
    b"a%23": "a#",
    b"%F0%9F%8E%AF": "🎯",
    "é".encode(): "é",
    b"%C3%A9" * 128: "é" * 128,
    b"...": "...",
    b"u/": "u",
}


async def test_request_is_refused_when_its_target_is_invalid(site: Live) -> None:
    targets = {status: [b"/profiles/" + name for name in names] for status, names in BAD_IDS.items()}
    for expected, some in (*targets.items(), *BAD_PATHS.items(), (400, BAD_QUERIES)):
        for target in some:
            status, body = await raw_status(site, target)
            assert (status, body["status"]) == (expected, expected), target


async def test_refused_parameter_is_named_with_all_that_is_allowed(site: Live) -> None:
    for path, name, allowed in (
        ("/profiles/ada?detail=2", "detail", "true or false"),
        ("/admin/users?limit=x", "limit", "a whole number from 1 to 100"),
        ("/admin/users?limit=101", "limit", "a whole number from 1 to 100"),
        ("/admin/data-quality?max_age_s=-1", "max_age_s", "a whole number from 0 to 31622400"),
        ("/admin?period=year", "period", "hour, day or month"),
    ):
        (issue,) = problem(await site.client.get(path), 400)["errors"]
        assert issue == {"path": name, "detail": f"must be {allowed}"}


@pytest.mark.parametrize("route", ["/events", "/profiles/batch", "/score"])
async def test_format_of_a_body_is_named_when_it_is_not_json(site: Live, route: str) -> None:
    for sent, name in (
        (gzip.compress(b"{}"), "gzip"),
        ("[{}]".encode("utf-16"), "text in UTF-16"),
        (b"\xef\xbb\xbf{}", "text with a byte order mark"),
    ):
        answer = await site.client.post(route, content=sent, headers=JSON)
        assert f"it is {name}; send JSON in UTF-8" in problem(answer, 400, name)["detail"]


async def test_id_in_a_path_is_decoded_once(site: Live) -> None:
    for escaped, user in DECODED.items():
        status, body = await raw_status(site, b"/profiles/" + escaped)
        assert (status, body["user_id"]) == (200, user), escaped


@pytest.mark.slow
async def test_allow_lists_the_documented_methods_and_options(site: Live) -> None:
    document = (await site.client.get("/schema/openapi.json")).json()
    for path, methods in document["paths"].items():
        documented = {word.upper() for word in methods if word in ("get", "post", "delete", "put", "patch")}
        expected = documented | {"OPTIONS"} | ({"HEAD"} if "GET" in documented else set())
        target = re.sub(r"\{[a-z_]*\}", "1", path)
        options = await site.client.options(target)
        assert options.status_code == 204, path
        refused = [await site.client.request(method, target) for method in ("PUT", "PATCH", "TRACE", "BREW")]
        for answer in (options, *refused):
            assert set(answer.headers["allow"].split(", ")) == expected, (answer.request.method, path)
        for answer in refused:
            problem(answer, 405)


async def test_head_answers_as_get_without_the_body(site: Live) -> None:
    pages = ("/admin", "/admin/users/u", "/admin/static/user.css", "/schema", "/schema/openapi.json")
    for path in (*pages, "/healthz", "/readyz", "/metrics", "/features", "/profiles/u"):
        got, head = await site.client.get(path), await site.client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        assert head.headers.keys() == got.headers.keys(), path
        assert head.headers["content-type"] == got.headers["content-type"], path


async def test_head_is_refused_where_get_is(site: Live) -> None:
    assert (await site.client.head("/events")).status_code == 405
    assert (await site.client.head("/nowhere")).status_code == 404


async def test_path_is_not_found_by_any_method_when_its_number_is_invalid(site: Live) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        problem(await site.client.request(method, "/admin/dead-letters/x"), 404)


async def test_defect_is_logged_and_not_shown_when_a_route_fails(
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


async def test_address_of_the_database_is_not_told(site: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object, **__: object) -> None:
        raise StoreUnavailable("connection to 10.0.0.7 failed", "no server can be reached")

    monkeypatch.setattr(ProfileReader, "read_as_of", read)
    row = {"user_id": new_user(), "as_of": rfc3339(site.now_ms)}
    answer = await site.client.post("/profiles/history", json={"rows": [row]})
    assert problem(answer, 503)["detail"] == "the database does not answer: no server can be reached"
