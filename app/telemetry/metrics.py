"""All metrics of a process; `docker/README.md` explains each.

Each attribute of `Metrics` is one Prometheus metric. Labels have a small closed set of values (feature, route,
outcome), never a user. Times are in seconds.
"""

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, start_http_server

import app
from app.telemetry.counters import FastCounter, HistogramCollector, OptionalGauge
from app.telemetry.logs import logger

COUNTS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
METRICS_RETRY_S = 1.0
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0)


class Metrics:
    def __init__(self) -> None:  # noqa: PLR0915  # a list of metrics
        self.collectors = collectors = CollectorRegistry()
        counter = partial(Counter, namespace="profiles", registry=collectors)
        gauge = partial(Gauge, namespace="profiles", registry=collectors)
        histogram = partial(Histogram, namespace="profiles", registry=collectors, buckets=FAST)
        slow_histogram = partial(histogram, buckets=SLOW)
        optional = partial(OptionalGauge, collectors)
        of_feature = partial(gauge, labelnames=["feature"])
        fast_counter = partial(FastCounter, collectors)
        fast_histogram = partial(HistogramCollector, collectors)
        self.request_seconds = fast_histogram(
            "http_request_duration_seconds", "Time to answer.", FAST, ["method", "route", "status"]
        )
        self.shed = counter("requests_shed_total", "Requests shed with 503, by kind of load.", ["kind"])
        self.rate_limited = counter("rate_limited_total", "Requests rejected with 429, by key name.", ["key"])
        self.cache_hits = fast_counter("cache_hits_total", "Feature values served from the cache.")
        self.near_hits = fast_counter("near_hits_total", "Cache hits served from the local cache.")
        self.cache_misses = fast_counter("cache_misses_total", "Feature values that the cache did not contain.")
        self.fills = counter("cache_fills_total", "Fills: stored, refused (the key changed), failed.", ["outcome"])
        self.degraded_reads = counter("degraded_reads_total", "Profiles computed without the cache.", ["reason"])
        self.unproven_reads = counter("unproven_reads_total", "Cached profiles served without the database.")
        self.cache_seconds = fast_histogram("cache_round_trip_seconds", "Round trip, by command.", FAST, ["command"])
        self.cache_errors = counter("cache_errors_total", "Cache commands that failed, by kind.", ["kind"])
        self.cache_available = gauge("cache_available", "1 while the circuit to the cache is closed.")
        self.computed_users = counter("computed_users_total", "Users whose features were computed.")
        self.computation_seconds = histogram("computation_seconds", "Time of one statement.")
        self.computation_errors = counter("computation_errors_total", "Values that failed, by feature.", ["feature"])
        self.events = counter("events_total", "Events by door and outcome.", ["door", "outcome"])
        self.commit_seconds = histogram("commit_seconds", "Time of one ingest transaction.")
        self.commit_events = histogram("commit_events", "Events that shared one commit.", buckets=COUNTS)
        self.invalidations = counter("invalidations_total", "Users with keys dropped, owed or settled.", ["outcome"])
        self.stale_dropped = counter("stale_values_dropped_total", "Stale values that a worker found and dropped.")
        self.owed = optional("owed_invalidations", "Invalidations owed to the cache at the last check.")
        self.queue_depth = optional("queue_depth", "Jobs waiting in the queue.")
        self.oldest_unconsumed = optional("oldest_unconsumed_event_age_seconds", "0 if all events are consumed.")
        self.unconsumed = optional("unconsumed_events", "Events that no worker has consumed yet.")
        self.dead_letters = optional("dead_letters", "Dead letters that wait for an admin.")
        self.events_ahead = optional("events_ahead", "Events more than five minutes ahead, counted up to 10,000.")
        self.publish_failures = counter("publish_failures_total", "Jobs that the queue did not accept.")
        self.invalidation_lag = histogram("invalidation_lag_seconds", "From arrival to dropped keys.", ["door"])
        self.queue_door_lag = histogram("queue_door_lag_seconds", "From a job's enqueueing to dropped keys.")
        self.consumption_lag = slow_histogram("consumption_lag_seconds", "From an event's arrival to its consumption.")
        self.consistency_checks = counter("consistency_checks_total", "Audited users.", ["after", "outcome"])
        self.consistency_violations = counter(
            "consistency_violations_total", "Wrong cached values that the audit found.", ["feature", "fault"]
        )
        self.consistency_repairs = counter("consistency_repairs_total", "Wrong cached values that the audit dropped.")
        self.decision_checks = counter("decision_checks_total", "Audited decisions, by outcome.", ["outcome"])
        self.quality_measured = optional("quality_measured_timestamp_seconds", "When data quality was measured last.")
        self.feature_psi = of_feature("feature_psi_ratio", "Population stability index against 7 days earlier.")
        self.feature_null = of_feature("feature_null_ratio", "Share of the cached values that are null.")
        self.feature_missing = of_feature("feature_missing_ratio", "Share of the users without a cached value.")
        self.feature_stale = of_feature("feature_stale_ratio", "Share of the users with a stale cached value.")
        self.decisions = counter("decisions_total", "Decisions by policy and source of profile.", ["policy", "profile"])
        self.decision_events = counter("decision_events_total", "Events about a decision, by outcome.", ["outcome"])
        self.decisions_settled = counter("decisions_settled_total", "Decisions settled by the sweep.", ["outcome"])
        self.learned_states = optional("learned_states", "Users with learned statistics.")
        self.states_to_grow = optional("states_to_grow", "Users whose statistics have an older, smaller spec.")
        self.prior_version = optional("prior_version", "Version of the newest pooled prior; 0 before the first.")
        self.unreadable_states = optional("unreadable_states", "Users whose statistics are damaged and set aside.")
        self.rollout_share = optional("rollout_share_ratio", "Share of users that the challenger serves, 0 to 1.")
        self.rollout_stage = gauge("rollout_stage", "1 for the current stage, 0 for the others.", ["stage"])
        self.jobs = counter("worker_jobs_total", "Jobs by name and outcome.", ["job", "outcome"])
        self.generations = counter("generations_total", "Tips written, by model, template or reason.", ["outcome"])
        self.model_seconds = slow_histogram("model_seconds", "Time of calling the model, including retries.")
        Info("build", "The release.", namespace="profiles", registry=collectors).info({"version": app.__version__})
        ProcessCollector(registry=collectors)

    def export_faults_as_zero(self, features: Iterable[str], faults: Iterable[str]) -> None:
        """Export the counters of faults before the first fault: Prometheus' `increase` needs a value to start from."""
        self.decision_checks.labels("violation")
        for feature in features:
            self.computation_errors.labels(feature)
            for fault in faults:
                self.consistency_violations.labels(feature, fault)


def serve_metrics(metrics: Metrics, host: str, port: int, setting: str) -> Callable[[], None]:
    """Serve the metrics over HTTP in a thread; the returned function stops it. Port 0: do nothing. If the port is
    taken, for example by the process that this one replaces, log the error, go on, and try again every second."""
    if port == 0:
        return lambda: None
    begin = partial(start_http_server, port, addr=host, registry=metrics.collectors)
    server: WSGIServer | None = None
    try:
        server = begin()[0]
    except OSError as error:
        detail = f"trying again every second; if another program keeps the port, set {setting} to another, or to 0"
        logger("telemetry").error("metrics_not_served", host=host, port=port, error=str(error), detail=detail)
    stopped = threading.Event()

    def run(server: WSGIServer | None) -> None:
        while server is None and not stopped.wait(METRICS_RETRY_S):
            with suppress(OSError):
                server = begin()[0]
        stopped.wait()
        if server is not None:
            server.shutdown()
            server.server_close()

    running = threading.Thread(target=run, args=(server,), daemon=True, name="metrics")
    running.start()

    def stop() -> None:
        stopped.set()
        running.join()

    return stop
