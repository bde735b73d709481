"""The pages of dead letters: show, replay one or all, discard with a reason."""

import json

import pytest
from playwright.async_api import Browser, expect

from tests.support.browser import Scheme, looks, visiting
from tests.support.events import payload, served
from tests.support.live import Live, new_user

EVIL = "</pre><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


async def bury(site: Live, content: object, error: str = "no event", traceback: str = "") -> int:
    text = content if isinstance(content, str) else json.dumps(content)
    (letter,) = await site.service.dead_letters.bury_payloads([(text, error)], site.now_ms)
    await site.service.database.execute("UPDATE dead_letters SET traceback = ? WHERE id = ?", (traceback, letter))
    return letter


async def bury_event(site: Live, user: str) -> int:
    """A dead letter of an event that a worker could not consume."""
    await site.send(served(user, site.now_ms))
    (event,) = await site.service.consumer.log.unconsumed(site.now_ms + 1, 10)
    trace = 'Traceback (most recent call last):\n  File "learn.py", line 7\nValueError: cannot learn'
    await site.service.dead_letters.failed(event.seq, "ValueError: cannot learn", trace, site.now_ms, 1)
    return (await site.service.dead_letters.list(0, 100))[-1].id


async def test_page_is_sound_when_there_is_no_letter(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters")
        assert "There are no dead letters" in await visitor.text()
        await visitor.assert_sound()


@looks
async def test_contents_of_letters_are_shown_as_text(
    own_site: Live, browser: Browser, scheme: Scheme, width: int
) -> None:
    site = own_site
    await bury(site, EVIL, EVIL, EVIL)
    await bury(site, {EVIL: EVIL, "user_id": "<b>" + "x" * 100}, EVIL)
    await bury(site, "x" * 50_000)
    last = await bury_event(site, new_user())
    async with visiting(browser, site, scheme=scheme, width=width) as visitor:
        for path in ("/admin/dead-letters", "/admin/dead-letters/1", "/admin/dead-letters/2", "/admin/dead-letters/3"):
            await visitor.go(path)
            for summary in await visitor.page.locator("summary").all():
                await summary.click()
            await visitor.assert_sound()
            assert await visitor.page.title() != "taken"
            assert await visitor.page.locator("main script, main img, main b").count() == 0
        await visitor.go("/admin/dead-letters/1")
        assert (await visitor.text()).count("<script>") == 3
        await visitor.go(f"/admin/dead-letters/{last}")
        await expect(visitor.page.get_by_text("ValueError: cannot learn").first).to_be_visible()


async def test_payload_is_formatted_and_the_traceback_folded(own_site: Live, browser: Browser) -> None:
    user = new_user()
    await bury_event(own_site, user)
    await bury(own_site, "y" * 5_000)
    async with visiting(browser, own_site, scripts=False) as visitor:
        page = visitor.page
        await visitor.go("/admin/dead-letters")
        letter = page.get_by_role("article", name="Letter 1")
        await expect(letter.get_by_label("Payload", exact=True)).to_contain_text(f'  "user_id": "{user}"')
        await expect(letter.get_by_role("link", name=user)).to_have_attribute("href", f"/admin/users/{user}")
        await expect(letter.get_by_text("learn.py")).to_be_hidden()
        await letter.get_by_text("Traceback", exact=True).click()
        await expect(letter.get_by_text("learn.py")).to_be_visible()
        long = page.get_by_role("article", name="Letter 2")
        assert len(await long.get_by_label("Beginning of the payload").inner_text()) < 2_000
        await long.get_by_role("link", name="The whole payload").click()
        await expect(page.get_by_label("Payload", exact=True)).to_have_text("y" * 5_000)


async def test_letters_are_paged(own_site: Live, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.admin.dead_letters.LETTERS_PER_PAGE", 2)
    for number in range(4):
        await bury(own_site, number)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters")
        headings = visitor.page.locator("article h2")
        await expect(headings).to_have_text(["Letter 1", "Letter 2"])
        await visitor.page.get_by_role("link", name="Next letters").click()
        await expect(headings).to_have_text(["Letter 3", "Letter 4"])
        await expect(visitor.page.get_by_role("link", name="Next letters")).to_have_count(0)
        await visitor.go("/admin/dead-letters?after=4")
        assert "There are no letters after this one" in await visitor.text()
        await visitor.page.get_by_role("link", name="To the first letter").click()
        await expect(visitor.page.locator("article").first).to_contain_text("Letter 1")


@pytest.mark.parametrize("scripts", [True, False])
async def test_letter_is_replayed(own_site: Live, browser: Browser, scripts: bool) -> None:
    user = new_user()
    letter = await bury(own_site, payload(served(user, own_site.now_ms)))
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        await visitor.go("/admin/dead-letters")
        await visitor.page.get_by_role("button", name=f"Replay letter {letter}").click()
        said = f"Letter {letter} was replayed: its event was ingested."
        await expect(visitor.page.get_by_role("status")).to_have_text(said)
    assert (await own_site.features(user))["tip_volume_30d"] == 1


async def test_event_is_unconsumed_again_when_its_letter_is_replayed(own_site: Live, browser: Browser) -> None:
    letter = await bury_event(own_site, new_user())
    async with visiting(browser, own_site) as visitor:
        await visitor.go(f"/admin/dead-letters/{letter}")
        await visitor.page.get_by_role("button", name=f"Replay letter {letter}").click()
        await expect(visitor.page.get_by_role("status")).to_contain_text("a worker will consume its event again")
    assert len(await own_site.service.consumer.log.unconsumed(own_site.now_ms + 1, 10)) == 1


async def test_page_shows_the_error_when_a_replay_fails(own_site: Live, browser: Browser) -> None:
    letter = await bury(own_site, {**payload(served("ann", own_site.now_ms)), "tip_id": "a/b"})
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters")
        await visitor.page.get_by_role("button", name=f"Replay letter {letter}").click()
        await expect(visitor.page).to_have_url(f"{own_site.url}/admin/dead-letters/{letter}")
        await expect(visitor.page.get_by_role("status")).to_contain_text(
            f"Letter {letter} was not replayed: tip_id: must not"
        )
        await visitor.expect_text("2, the last")
        await visitor.assert_sound()


async def test_page_says_that_a_replayed_letter_is_gone(own_site: Live, browser: Browser) -> None:
    letter = await bury(own_site, payload(served(new_user(), own_site.now_ms)))
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters")
        await own_site.client.post(f"/admin/dead-letters/{letter}/replay")
        await visitor.page.get_by_role("button", name=f"Replay letter {letter}").click()
        await expect(visitor.page.get_by_role("status")).to_contain_text(f"Letter {letter} is gone")


@pytest.mark.parametrize("scripts", [True, False])
async def test_all_letters_are_replayed_and_failures_listed(
    own_site: Live, browser: Browser, monkeypatch: pytest.MonkeyPatch, scripts: bool
) -> None:
    monkeypatch.setattr("app.events.queue_door.AT_ONCE", 1)
    monkeypatch.setattr("app.events.queue_door.MOST", 2)
    users = [new_user() for _ in range(2)]
    await bury(own_site, payload(served(users[0], own_site.now_ms)))
    bad = await bury(own_site, EVIL)
    await bury(own_site, payload(served(users[1], own_site.now_ms)))
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page
        await visitor.go("/admin/dead-letters")
        confirm = page.get_by_role("button", name="Replay all")
        await expect(confirm).to_be_hidden()
        await page.locator("summary", has_text="Replay all").click()
        await confirm.click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("Dead letters replayed")
        row = page.locator("tbody tr")
        await expect(row).to_contain_text("not valid JSON")
        await expect(row.get_by_role("link")).to_have_attribute("href", f"/admin/dead-letters/{bad}")
        if scripts:
            await visitor.assert_sound()
        await page.get_by_role("button", name="Replay the next ones").click()
        await expect(page.locator("tbody")).to_have_count(0)
        await visitor.expect_text("Events ingested: 1.")
    assert [letter.id for letter in await own_site.service.dead_letters.list(0, 10)] == [bad]


@pytest.mark.parametrize("scripts", [True, False])
async def test_letter_is_discarded_with_a_reason(own_site: Live, browser: Browser, scripts: bool) -> None:
    letter = await bury(own_site, EVIL)
    async with visiting(browser, own_site, scripts=scripts) as visitor:
        page = visitor.page
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.method))
        await visitor.go("/admin/dead-letters")
        confirm = page.get_by_role("button", name=f"Discard letter {letter}")
        await expect(confirm).to_be_hidden()
        await page.locator("summary", has_text="Discard").click()
        await confirm.click()  # the browser asks for the reason
        await page.get_by_label("Why?").fill(f"a test {EVIL}")
        await confirm.click()
        await expect(page.get_by_role("status")).to_have_text(f"Letter {letter} was discarded.")
        assert sent.count("POST") == 1, "it was sent without a reason"
        assert await own_site.service.dead_letters.get(letter) is None
        await visitor.go("/admin/audit")
        assert f"a test {EVIL}" in (await page.locator("tbody tr").first.inner_text())
        if scripts:
            await visitor.assert_sound()


@pytest.mark.parametrize("reason", ["", "   ", "x" * 401, "a\tb"])
async def test_letter_stays_when_the_reason_is_invalid(own_site: Live, browser: Browser, reason: str) -> None:
    letter = await bury(own_site, 1)
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters")
        token = await visitor.page.locator("input[name=csrf_token]").first.get_attribute("value")
        answer = await visitor.context.request.post(
            f"{own_site.url}/admin/dead-letters/{letter}/discard", form={"csrf_token": str(token), "reason": reason}
        )
        assert answer.status == 422
        assert "reason" in await answer.text()
    assert await own_site.service.dead_letters.get(letter) is not None


async def test_letter_is_an_error_page_when_it_does_not_exist(own_site: Live, browser: Browser) -> None:
    async with visiting(browser, own_site) as visitor:
        await visitor.go("/admin/dead-letters/7", status=404)
        assert "There is no dead letter 7" in await visitor.text()
