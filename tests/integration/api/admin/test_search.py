"""`GET /admin/users`: ids by their beginning."""

from __future__ import annotations

from urllib.parse import quote

import pytest

from tests.support.events import served
from tests.support.live import Live, new_user, paths, problem


async def known(site: Live, *users: str) -> None:
    await site.send(*(served(user, site.now_ms) for user in users))


async def found(site: Live, prefix: str, **query: int) -> tuple[list[str], bool]:
    answer = await site.client.get("/admin/users", params={"prefix": prefix, **query})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["prefix"] == prefix
    return body["user_ids"], body["more"]


async def test_users_are_found_by_the_beginning_of_their_ids(site: Live) -> None:
    stem = new_user("stem")
    await known(site, stem + "b", stem + "a", stem + "a", stem, stem + "é 🎯", new_user("other"))
    assert await found(site, stem) == ([stem, stem + "a", stem + "b", stem + "é 🎯"], False)
    assert await found(site, stem + "é ") == ([stem + "é 🎯"], False)
    assert await found(site, stem, limit=2) == ([stem, stem + "a"], True)
    assert await found(site, stem.upper()) == ([], False)
    assert await found(site, new_user()) == ([], False)


async def test_wildcards_are_letters(own_site: Live) -> None:
    await known(own_site, "a%b", "a_b", "axb", "a*b", "a'b", "A%b")
    assert await found(own_site, "a%") == (["a%b"], False)
    assert await found(own_site, "a_") == (["a_b"], False)
    assert await found(own_site, "a*") == (["a*b"], False)
    assert await found(own_site, "a'") == (["a'b"], False)
    assert await found(own_site, ".") == ([], False)


async def test_twenty_are_shown_when_no_limit_is_given(own_site: Live) -> None:
    await known(own_site, *(f"user-{number:02d}" for number in range(21)))
    users, more = await found(own_site, "")
    assert (len(users), more) == (20, True)
    assert await found(own_site, "user-", limit=100) == ([f"user-{number:02d}" for number in range(21)], False)


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "limit=null", "prefix=%00", "prefix=a/b", "nope=1"]
)
async def test_query_is_refused_when_it_is_not_allowed(site: Live, query: str) -> None:
    assert paths(problem(await site.client.get(f"/admin/users?{query}"), 400)) == [query.partition("=")[0]]


async def test_query_is_refused_when_the_prefix_is_longer_than_any_id(site: Live) -> None:
    problem(await site.client.get(f"/admin/users?prefix={quote('é' * 129)}"), 400)
    assert await found(site, "é" * 128) == ([], False)
