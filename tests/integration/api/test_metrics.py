"""`GET /metrics`: the documented series after traffic, and labels of bounded number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import app
from app.stores.valkey.embedded import EmbeddedServer
from tests.support.decisions import move_to
from tests.support.events import feedback, payload, served
from tests.support.live import Live, new_user
from tests.support.registry import REGISTRY
from tests.support.site import ServeSite

WIDTH = len(REGISTRY)


class Scrape:
    def __init__(self, text: str) -> None:
        self.text = text
        self._families = list(text_string_to_metric_families(text))

    def samples(self) -> Iterator[Sample]:
        for family in self._families:
            yield from family.samples

    def value(self, name: str, **labels: str) -> float:
        found = [item.value for item in self.samples() if item.name == f"profiles_{name}" and item.labels == labels]
        assert len(found) <= 1
        return found[0] if found else 0.0

    def total(self, name: str) -> float:
        return sum(item.value for item in self.samples() if item.name == f"profiles_{name}")

    def documented(self) -> dict[str, str]:
        return {family.name: family.documentation for family in self._families}


async def scrape(site: Live) -> Scrape:
    answer = await site.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(answer.text)


async def test_metrics_count_the_traffic(own_site: Live) -> None:
    site = own_site
    user = new_user()
    event = served(user, site.now_ms)
    await site.send(event, feedback(user, site.now_ms))
    await site.send(event)
    await site.features(user)
    await site.filled()
    await site.features(user)
    await site.client.get("/profiles/u?nope=1")
    await site.client.post("/events", json=[{"subject": "?"}])
    conflict = served(user, site.now_ms, event_id=event.event_id, tip_id="another")
    assert (await site.client.post("/events", json=[])).status_code == 422
    await site.service.dead_letters.bury_payloads([("1", "no event")], site.now_ms)
    seen = await scrape(site)

    def requests(method: str, route: str, status: int) -> float:
        return seen.value("http_request_duration_seconds_count", method=method, route=route, status=str(status))

    assert requests("GET", "/profiles/{user_id}", 200) == 2
    assert requests("GET", "/profiles/{user_id}", 400) == 1
    assert requests("POST", "/events", 202) == 2
    assert requests("POST", "/events", 422) == 2
    assert seen.value("cache_misses_total") == WIDTH
    assert seen.value("cache_hits_total") == WIDTH
    assert seen.value("cache_fills_total", outcome="stored") == WIDTH
    assert seen.total("degraded_reads_total") == 0
    assert seen.value("computed_users_total") == 1
    assert seen.value("computation_seconds_count") == 1
    for command in ("read", "lease", "fill", "del"):
        assert seen.value("cache_round_trip_seconds_count", command=command) >= 1
        assert 0 < seen.value("cache_round_trip_seconds_sum", command=command) < 5
    assert seen.value("cache_available") == 1
    assert seen.value("events_total", door="http", outcome="accepted") == 2
    assert seen.value("events_total", door="http", outcome="duplicate") == 1
    assert seen.value("commit_seconds_count") == 2
    assert seen.value("commit_events_sum") == 3
    assert seen.value("invalidations_total", outcome="dropped") == 2
    assert seen.value("invalidation_lag_seconds_count", door="http") == 2
    assert seen.value("unconsumed_events") == 2
    assert 0 <= seen.value("oldest_unconsumed_event_age_seconds") < 60
    assert seen.value("dead_letters") == 1
    assert seen.value("owed_invalidations") == 0
    assert seen.value("queue_depth") >= 0
    assert (await site.client.post("/events", json=payload(conflict))).status_code == 409
    assert (await scrape(site)).value("events_total", door="http", outcome="conflict") == 1


async def test_metrics_of_workers_are_missing_in_an_api_process(own_site: Live) -> None:
    seen = await scrape(own_site)
    names = {"learned_states", "states_to_grow", "prior_version"}
    assert not {f"profiles_{name}" for name in names} & seen.documented().keys()
    await own_site.service.bandit.maintenance.once()  # as a worker does
    seen = await scrape(own_site)
    assert {f"profiles_{name}" for name in names} <= seen.documented().keys()
    assert seen.value("unreadable_states") == 0


async def test_metrics_show_the_release_and_the_process(own_site: Live) -> None:
    seen = await scrape(own_site)
    assert seen.value("build_info", version=app.__version__) == 1
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds"} <= seen.documented().keys()


async def test_metrics_show_data_quality_after_a_measurement(own_site: Live) -> None:
    site, (cached, missing) = own_site, (new_user(), new_user())
    assert "profiles_quality_measured_timestamp_seconds" not in (await scrape(site)).documented()
    await site.send(served(cached, site.now_ms), served(missing, site.now_ms))
    await site.features(cached)
    await site.filled()
    run, _ = await site.service.quality.runs.open("test", site.now_ms)
    await site.service.quality.carry_out(run.id, 60)
    seen = await scrape(site)
    assert seen.value("quality_measured_timestamp_seconds") == pytest.approx(site.now_ms / 1000, abs=60)
    assert seen.value("feature_missing_ratio", feature="tip_volume_30d") == 0.5
    assert seen.value("feature_stale_ratio", feature="tip_volume_30d") == 0
    assert seen.value("feature_null_ratio", feature="completion_rate_30d") == 1
    drifting = {item.labels["feature"] for item in seen.samples() if item.name == "profiles_feature_psi_ratio"}
    assert not drifting  # too few users


async def test_metrics_show_the_stage_of_the_rollout(own_site: Live) -> None:
    def stage(found: Scrape) -> dict[str, float]:
        return {item.labels["stage"]: item.value for item in found.samples() if item.name == "profiles_rollout_stage"}

    before = await scrape(own_site)
    assert stage(before) == {"shadow": 1, "ramp": 0, "promoted": 0, "rolled back": 0}
    assert before.value("rollout_share_ratio") == 0
    await move_to(own_site.service, "ramp", 0.25)
    at_25 = await scrape(own_site)
    assert (stage(at_25)["ramp"], at_25.value("rollout_share_ratio")) == (1, 0.25)
    await own_site.service.bandit.rollout.move("rollback", "the worker", "bad")
    back = await scrape(own_site)
    assert stage(back) == {"shadow": 0, "ramp": 0, "promoted": 0, "rolled back": 1}
    assert back.value("rollout_share_ratio") == 0


async def test_every_metric_has_the_prefix_and_an_explanation(site: Live) -> None:
    documented = (await scrape(site)).documented()
    assert all(name.startswith(("profiles_", "process_")) for name in documented)
    assert all(text.endswith(".") for text in documented.values()), documented


async def test_metrics_contain_no_ids(own_site: Live) -> None:
    site = own_site
    user, event = new_user("someone"), served(new_user("other"), site.now_ms)
    await site.send(served(user, site.now_ms), event)
    await site.features(user)
    await site.client.get(f"/admin/users/{user}")
    await site.client.post("/profiles/batch", json={"user_ids": [user]})
    await site.client.delete(f"/admin/users/{user}")
    await site.client.get(f"/nothing/{user}")
    text = (await scrape(site)).text
    for secret in (user, event.user_id, event.event_id, event.tip_id + '"'):
        assert secret not in text


async def test_labels_stay_few_when_clients_send_arbitrary_requests(own_site: Live) -> None:
    for number in range(20):
        await own_site.client.get(f"/nothing/{number}")
        await own_site.client.get(f"/profiles/a%2F{number}")
        await own_site.client.request(f"BREW{number}", "/profiles/u")
        await own_site.client.request(f"BREW{number}", f"/nothing/{number}")
    seen = {
        tuple(sorted(item.labels.items())): item.value
        for item in (await scrape(own_site)).samples()
        if item.name == "profiles_http_request_duration_seconds_count"
    }
    labels = {(dict(key)["method"], dict(key)["route"], dict(key)["status"]): int(count) for key, count in seen.items()}
    assert labels == {
        ("GET", "unmatched", "404"): 20,
        ("GET", "unmatched", "422"): 20,
        ("other", "unmatched", "405"): 20,
        ("other", "unmatched", "404"): 20,
    }


@pytest.mark.slow
async def test_metrics_show_an_outage_when_cache_and_queue_are_down(
    serve_site: ServeSite, cache: EmbeddedServer, queue: EmbeddedServer
) -> None:
    async with serve_site(cache_url=cache.url, queue_url=queue.url) as site:
        cache.kill()
        queue.kill()
        user = new_user()
        for _ in range(4):
            await site.features(user)
        answer = await site.client.post("/events", json=payload(served(user, site.now_ms)))
        assert answer.json() == {"accepted": 1, "duplicates": 0, "invalidated": False}
        seen = await scrape(site)
    assert seen.value("degraded_reads_total", reason="unavailable") == 4
    assert seen.value("cache_available") == 0
    assert seen.total("cache_errors_total") >= 3
    assert "profiles_queue_depth" not in seen.documented()
    assert seen.value("invalidations_total", outcome="owed") == 1
    assert seen.value("owed_invalidations") == 1
