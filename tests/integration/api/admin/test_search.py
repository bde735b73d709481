"""`GET /admin/users`: user ids by prefix."""

from urllib.parse import quote

from tests.support.events import served
from tests.support.live import Live, new_user, paths, problem


async def known(site: Live, *users: str) -> None:
    await site.send(*(served(user, site.now_ms) for user in users))


async def found(site: Live, prefix: str, **query: int) -> tuple[list[str], bool]:
    body = await site.json("/admin/users", params={"prefix": prefix, **query})
    assert body["prefix"] == prefix
    return body["user_ids"], body["more"]


async def test_users_are_found_by_a_prefix_of_their_ids(site: Live) -> None:
    stem = new_user("stem")
    await known(site, stem + "b", stem + "a", stem + "a", stem, stem + "é 🎯", new_user("other"))
    assert await found(site, stem) == ([stem, stem + "a", stem + "b", stem + "é 🎯"], False)
    assert await found(site, stem + "é ") == ([stem + "é 🎯"], False)
    assert await found(site, stem, limit=2) == ([stem, stem + "a"], True)
    assert await found(site, stem.upper()) == ([], False)
    assert await found(site, new_user()) == ([], False)


async def test_wildcards_are_ordinary_characters(own_site: Live) -> None:
    await known(own_site, "a%b", "a_b", "axb", "a*b", "a'b", "A%b")
    assert await found(own_site, "a%") == (["a%b"], False)
    assert await found(own_site, "a_") == (["a_b"], False)
    assert await found(own_site, "a*") == (["a*b"], False)
    assert await found(own_site, "a'") == (["a'b"], False)
    assert await found(own_site, ".") == ([], False)


async def test_twenty_users_are_listed_when_no_limit_is_given(own_site: Live) -> None:
    await known(own_site, *(f"user-{number:02d}" for number in range(21)))
    users, more = await found(own_site, "")
    assert (len(users), more) == (20, True)
    assert await found(own_site, "user-", limit=100) == ([f"user-{number:02d}" for number in range(21)], False)


async def test_query_is_refused_when_it_is_invalid(site: Live) -> None:
    too_long = f"prefix={quote('é' * 129)}"
    queries = ("limit=0", "limit=101", "limit=x", "limit=null", "prefix=%00", "prefix=a/b", "nope=1", too_long)
    for query in queries:
        answer = problem(await site.client.get(f"/admin/users?{query}"), 400)
        assert paths(answer) == [query.partition("=")[0]], query
    assert await found(site, "é" * 128) == ([], False)
