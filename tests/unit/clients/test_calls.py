"""Requests, retries, deadlines and errors of the Python client, on a transport that follows a script."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from math import nan
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from profiles_client import (
    Candidate,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    Forbidden,
    Invalid,
    Issue,
    Malformed,
    NotFound,
    ProfileFeatures,
    ProfilesError,
    RateLimited,
    Rejected,
    StorageFull,
    TipServed,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from profiles_client.calls import Calls, current_traceparent, or_default, run
from profiles_client.model import Choice
from profiles_client.wire import Request, Response

PROFILE = Response(200, {}, b'{"user_id": "ann", "features": {"tip_volume_30d": 3, "of_a_later_release": 1}}')
RECEIPT = Response(202, {}, b'{"accepted": 1, "duplicates": 0, "invalidated": true}')
LOST = ConnectionLost("connection refused")


class Script:
    """A transport that gives these answers in turn, and then repeats the last. Time passes in pauses only."""

    def __init__(self, *answers: Response | ProfilesError) -> None:
        self._answers = list(answers)
        self.requests: list[Request] = []
        self.pauses: list[float] = []

    def now(self) -> float:
        return 100.0 + sum(self.pauses)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def exchange(self, request: Request, deadline: float) -> Response:
        assert self.now() < deadline
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, ProfilesError):
            raise answer
        return answer

    async def close(self) -> None:
        return


def calls(script: Script, *, deadline_s: float = 1.0, seed: int = 1, traceparent: str | None = None) -> Calls:
    return Calls(script, ProfileFeatures, deadline_s, lambda: traceparent, Random(seed))


def failed(status: int, retry_after: str | None = None, **problem: Any) -> Response:
    headers = {b"x-request-id": b"request-1"} | ({b"retry-after": retry_after.encode()} if retry_after else {})
    return Response(
        status, headers, json.dumps({"status": status, "title": "Title", "detail": "why", **problem}).encode()
    )


def read(script: Script, **options: Any) -> ProfileFeatures:
    return run(calls(script, **options).profile("ann", None))


@pytest.mark.parametrize("failure", [failed(429), failed(503), failed(507), failed(502), failed(504), LOST])
def test_call_is_repeated_when_the_failure_may_pass(failure: Any) -> None:
    script = Script(failure, failure, PROFILE)
    assert read(script).tip_volume_30d == 3
    assert len(script.requests) == 3
    assert len(set(script.requests)) == 1
    assert all(0 <= pause <= 0.04 for pause in script.pauses)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 422, 500])
def test_call_is_not_repeated_when_the_request_must_change(status: int) -> None:
    script = Script(failed(status), PROFILE)
    with pytest.raises(ProfilesError):
        read(script)
    assert script.pauses == []


def test_call_is_not_repeated_when_the_deadline_has_passed() -> None:
    script = Script(DeadlineExceeded("late"), PROFILE)
    with pytest.raises(DeadlineExceeded):
        read(script)
    assert len(script.requests) == 1


def test_error_at_the_deadline_names_the_failure_before() -> None:
    with pytest.raises(DeadlineExceeded, match="late; the attempt before: connection refused"):
        read(Script(LOST, DeadlineExceeded("late")))


@pytest.mark.parametrize("failure", [failed(503), LOST])
def test_failures_end_with_the_deadline(failure: Any) -> None:
    script = Script(failure)
    with pytest.raises(Unavailable) as caught:
        read(script, deadline_s=5)
    assert str(caught.value) in {"connection refused", "503 Title: why"}
    assert 3 < sum(script.pauses) < 5
    assert 8 < len(script.requests) < 40
    assert max(script.pauses) <= 1


def test_pauses_grow_and_differ_between_clients() -> None:
    scripts = [Script(LOST) for _ in range(20)]
    for seed, script in enumerate(scripts):
        with pytest.raises(ConnectionLost):
            read(script, seed=seed)
    assert len({script.pauses[0] for script in scripts}) == 20
    means = [sum(script.pauses[index] for script in scripts) / 20 for index in range(4)]
    assert means == sorted(means)


def test_service_decides_when_the_call_is_repeated() -> None:
    scripts = [Script(failed(503, "2"), PROFILE) for _ in range(50)]
    for seed, script in enumerate(scripts):
        read(script, deadline_s=10, seed=seed)
    pauses = [pause for script in scripts for pause in script.pauses]
    assert len(pauses) == 50
    assert 2 <= min(pauses) < 2.2  # none comes early
    assert 2.8 < max(pauses) <= 3  # and they are spread


def test_service_may_name_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    script = Script(failed(429, soon), PROFILE)
    read(script, deadline_s=100)
    assert 28 < script.pauses[0] <= 45


@pytest.mark.parametrize("header", ["soon", "-1", "²", "", f"Mon, 30 Nov 2026 00:00:00 +{'9' * 20}"])
def test_retry_after_is_ignored_when_it_is_invalid(header: str) -> None:
    answer = Response(503, {b"retry-after": header.encode()}, b"{}")
    script = Script(answer, PROFILE)
    assert read(script).tip_volume_30d == 3


def test_call_fails_at_once_when_it_would_be_repeated_too_late() -> None:
    script = Script(failed(429, "1"), PROFILE)
    with pytest.raises(RateLimited) as caught:
        read(script)
    assert caught.value.retry_after_s == 1
    assert script.pauses == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Malformed),
        (401, Unauthenticated),
        (403, Forbidden),
        (404, NotFound),
        (405, Rejected),
        (409, Conflict),
        (413, TooLarge),
        (422, Invalid),
        (429, RateLimited),
        (500, Unavailable),
        (503, Unavailable),
        (507, StorageFull),
    ],
)
def test_problem_becomes_an_error_of_its_status(status: int, kind: type[ProfilesError]) -> None:
    answer = failed(status, "9", type="urn:x", errors=[{"path": "rows[0]", "detail": "missing"}])
    with pytest.raises(kind) as caught:
        read(Script(answer))
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, Unavailable if status >= 429 and status != 431 else Rejected)
    assert str(error) == f"{status} Title: why; rows[0]: missing"
    assert error.issues == (Issue("rows[0]", "missing"),)
    assert error.problem is not None
    assert (error.problem.type, error.problem.status, error.problem.detail) == ("urn:x", status, "why")
    assert (error.request_id, error.retry_after_s) == ("request-1", 9)


@pytest.mark.parametrize(
    "body", [b"<html>Bad Gateway</html>", b"", b"\xff", b'{"status": "x"}', b"[]", b'{"title": "\xff"}']
)
def test_error_of_a_proxy_needs_no_problem(body: bytes) -> None:
    with pytest.raises(Rejected) as caught:
        read(Script(Response(451, {}, body)))
    assert str(caught.value).startswith("451 Unavailable For Legal Reasons: ")


def test_redirect_names_its_target() -> None:
    with pytest.raises(Rejected, match=r"^302 Redirect: to https://sign-in\.example/; ") as caught:
        read(Script(Response(302, {b"location": b"https://sign-in.example/"}, b"")))
    assert caught.value.problem is not None
    assert caught.value.problem.status == 302


def test_answer_that_breaks_the_contract_is_an_error() -> None:
    answer = Response(200, {}, b'{"user_id": "ann", "features": {"tip_volume_30d": "three"}}')
    with pytest.raises(ProfilesError, match=r"tip_volume_30d"):
        read(Script(answer))


@pytest.mark.parametrize("body", [b"<html>Sign in</html>", b"", b'{"user_id": "\xff"}'])
def test_answer_that_is_not_json_is_an_error(body: bytes) -> None:
    with pytest.raises(ProfilesError, match=r"^the answer is not JSON: ."):
        read(Script(Response(200, {}, body)))


def test_deadline_of_a_call_must_be_a_number() -> None:
    script = Script(PROFILE)
    with pytest.raises(ValueError, match=r"^deadline_s: "):
        run(calls(script).profile("ann", nan))
    assert not script.requests


def test_decision_is_not_asked_for_when_its_time_is_a_text() -> None:
    script, at = Script(PROFILE), cast(datetime, "2026-11-29T10:00:00Z")
    with pytest.raises(AttributeError):
        run(calls(script).decide(Choice, "ann", [Candidate("t", True, 1, 1)], at, {}, explore=True, deadline_s=None))
    assert not script.requests


@pytest.mark.parametrize("failure", [LOST, failed(503, "5"), failed(500), DeadlineExceeded("late")])
def test_default_replaces_a_failure_of_the_service(failure: Any) -> None:
    assert run(or_default(calls(Script(failure)).profile("ann", None), None)) is None


@pytest.mark.parametrize("failure", [failed(401), failed(404), failed(422)])
def test_default_does_not_hide_a_mistake_of_the_caller(failure: Any) -> None:
    with pytest.raises(Rejected):
        run(or_default(calls(Script(failure)).profile("ann", None), None))


def sent(requests: Iterable[Request]) -> list[Any]:
    return [json.loads(request.body or b"null") for request in requests]


def test_event_keeps_its_id_when_it_is_sent_again() -> None:
    script = Script(LOST, failed(503), RECEIPT)
    event = TipServed(user_id="ann", tip_id="tip", occurred_at=datetime.now(UTC))
    run(calls(script).send([event], None))
    assert sent(script.requests) == [sent(script.requests)[0]] * 3
    run(calls(script).send(event, None))
    assert sent(script.requests)[-1] == sent(script.requests)[0]
    assert TipServed(user_id="ann", tip_id="tip", occurred_at=event.occurred_at).event_id != event.event_id


def test_decision_keeps_its_request_id_when_it_is_asked_again() -> None:
    score = Response(200, {}, b'{"decision_id": "d", "chosen_id": "t", "ranking": []}')
    script = Script(LOST, score)
    for _ in range(2):
        run(calls(script).decide(Choice, "ann", [], None, {}, explore=True, deadline_s=None))
    first, again, other = (body["request_id"] for body in sent(script.requests))
    assert first == again != other


def test_further_features_are_sent_beside_the_others() -> None:
    script = Script(Response(200, {}, b'{"decision_id": "d", "chosen_id": "t", "ranking": []}'))
    tips = [Candidate("t", True, 1, 2, {"kind": "call"}), Candidate("u", False, 1, 2)]
    at = datetime(2026, 3, 2, tzinfo=UTC)
    run(calls(script).decide(Choice, "ann", tips, at, {"weather": "rain"}, explore=True, deadline_s=None))
    (body,) = sent(script.requests)
    assert body["context"] == {"at": "2026-03-02T00:00:00Z", "weather": "rain"}
    assert [item["features"] for item in body["candidates"]] == [
        {"is_overdue": True, "task_age_days": 1, "priority": 2, "kind": "call"},
        {"is_overdue": False, "task_age_days": 1, "priority": 2},
    ]


def test_chunks_share_one_deadline() -> None:
    script = Script(failed(503, "1"), Response(200, {}, b'{"profiles": []}'), failed(503, "1"))
    with pytest.raises(Unavailable):
        run(calls(script, deadline_s=2).profiles(map(str, range(2_500)), None))
    assert [len(body["user_ids"]) for body in sent(script.requests)] == [1_000, 1_000, 1_000]
    assert len(script.pauses) == 1


def test_call_can_have_a_deadline_of_its_own() -> None:
    script = Script(failed(503, "2"), PROFILE)
    with pytest.raises(Unavailable):
        run(calls(script).profile("ann", None))
    run(calls(Script(failed(503, "2"), PROFILE)).profile("ann", 5))


def test_every_request_passes_the_traceparent_on() -> None:
    script = Script(LOST, PROFILE)
    read(script, traceparent="00-1-2-01")
    assert [request.traceparent for request in script.requests] == ["00-1-2-01", "00-1-2-01"]


def test_traceparent_is_that_of_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    def span(*, is_valid: bool) -> SimpleNamespace:
        context = SimpleNamespace(is_valid=is_valid, trace_id=0xABC, span_id=0xDEF, trace_flags=1)
        return SimpleNamespace(get_span_context=lambda: context)

    monkeypatch.delitem(__import__("sys").modules, "opentelemetry.trace", raising=False)
    assert current_traceparent() is None
    for is_valid, expected in ((True, f"00-{0xABC:032x}-{0xDEF:016x}-01"), (False, None)):
        module = SimpleNamespace(get_current_span=lambda is_valid=is_valid: span(is_valid=is_valid))
        monkeypatch.setitem(__import__("sys").modules, "opentelemetry.trace", module)
        assert current_traceparent() == expected


def features_of(**fingerprints: str) -> Response:
    items = [{"name": name, "fingerprint": value, "dtype": "int"} for name, value in fingerprints.items()]
    return Response(200, {}, json.dumps({"features": items}).encode())


def test_contract_agrees_with_the_service() -> None:
    assert run(calls(Script(features_of(**ProfileFeatures.FINGERPRINTS))).contract_problem()) is None


def test_every_difference_of_the_contract_is_named() -> None:
    theirs = {**ProfileFeatures.FINGERPRINTS, "snooze_rate": "1", "preferred_hour": "2"}
    del theirs["tip_volume_30d"]
    assert run(calls(Script(features_of(**theirs))).contract_problem()) == (
        "the service has other features than ProfileFeatures: "
        "preferred_hour is defined differently, snooze_rate is new, tip_volume_30d is missing"
    )


@pytest.mark.parametrize("answer", [failed(403), failed(503), LOST, Response(200, {}, b"{}")])
def test_contract_is_not_judged_when_the_service_does_not_tell(answer: Any) -> None:
    script = Script(answer)
    assert run(calls(script).contract_problem()) is None
    assert len(script.requests) == 1
