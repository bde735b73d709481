"""Judges the cache and the queue: the one may lose anything, the other nothing."""

from __future__ import annotations

from app.operations.doctor.facts import Line, ServerFacts, Unreached

LEAST_VERSION = (7, 0)
SKEW_WARN_MS, SKEW_BAD_MS = 1_000, 30_000
NO_EVICTION = "noeviction"


def diagnose_cache(found: ServerFacts | Unreached) -> list[Line]:
    """Lines about the cache."""
    if isinstance(found, Unreached):
        remedy = "Start it, or correct PROFILES_CACHE_URL. Until then every read computes: right, but slower."
        return [Line("cache", "bad", f"it cannot be asked: {found.reason}", remedy)]
    return [*_common("cache", found), _cache_memory(found)]


def diagnose_queue(found: ServerFacts | Unreached) -> list[Line]:
    """Lines about the queue, and the workers that show themselves there."""
    if isinstance(found, Unreached):
        remedy = "Start it, or correct PROFILES_QUEUE_URL. Until then events wait for a worker's sweep."
        return [Line("queue", "bad", f"it cannot be asked: {found.reason}", remedy)]
    return [*_common("queue", found), _queue_eviction(found), _queue_persistence(found), _worker(found)]


def diagnose_both(cache: ServerFacts | Unreached, queue: ServerFacts | Unreached) -> list[Line]:
    """Whether they are two."""
    if isinstance(cache, Unreached) or isinstance(queue, Unreached):
        return []
    if cache.run_id != queue.run_id:
        return [Line("separate", "ok", "cache and queue are two servers")]
    remedy = "Give the queue a server of its own: a cache must evict, a queue must not."
    if _evicts(cache):
        return [Line("separate", "bad", f"cache and queue share a server that evicts ({cache.policy})", remedy)]
    return [Line("separate", "warn", "cache and queue share a server; emptying the cache would empty both", remedy)]


def _common(name: str, found: ServerFacts) -> list[Line]:
    version = ".".join(map(str, found.version))
    lines = [Line(name, "ok", f"{found.flavour} {version} answers")]
    if found.version < LEAST_VERSION:
        lines = [Line(name, "bad", f"{found.flavour} {version} is too old", "Run Redis or Valkey 7.0 or later.")]
    if found.role != "master":
        remedy = f"Point PROFILES_{name.upper()}_URL at the master, or at the Sentinels (?sentinel=NAME)."
        lines.append(Line(f"{name} writes", "bad", f"it is a {found.role}, which takes no writes", remedy))
    elif found.refuses is not None:
        remedy = "Look at its log, its disk, its memory limit and the rights of the user in the URL."
        lines.append(Line(f"{name} writes", "bad", found.refuses, remedy))
    else:
        lines.append(Line(f"{name} writes", "ok", "it takes writes"))
    lines.append(_clock(name, found))
    return lines


def _clock(name: str, found: ServerFacts) -> Line:
    off_ms = max(0, abs(found.ahead_ms) - found.unsure_ms)
    if off_ms < SKEW_WARN_MS:
        return Line(f"{name} clock", "ok", f"it agrees with ours to {max(found.unsure_ms, abs(found.ahead_ms))} ms")
    text = f"it is {off_ms / 1000:,.1f} s {'ahead of' if found.ahead_ms > 0 else 'behind'} ours"
    remedy = "Let NTP set the clocks of both machines; events more than five minutes ahead are refused."
    return Line(f"{name} clock", "bad" if off_ms >= SKEW_BAD_MS else "warn", text, remedy)


def _evicts(found: ServerFacts) -> bool:
    return found.maxmemory > 0 and found.policy != NO_EVICTION


def _cache_memory(found: ServerFacts) -> Line:
    if found.maxmemory == 0:
        remedy = "Set maxmemory, and maxmemory-policy allkeys-lru or allkeys-lfu."
        return Line("cache memory", "warn", "it has no memory limit, and grows with the users", remedy)
    shown = f"{found.maxmemory / 2**20:,.0f} MiB, {found.policy}"
    if found.policy == NO_EVICTION:
        remedy = "Set maxmemory-policy allkeys-lru or allkeys-lfu."
        return Line("cache memory", "warn", f"{shown}: once full, it takes no new values", remedy)
    return Line("cache memory", "ok", f"limited to {shown}")


def _queue_eviction(found: ServerFacts) -> Line:
    remedy = "Set maxmemory-policy noeviction on the queue's server."
    if found.policy == NO_EVICTION:
        return Line("queue eviction", "ok", "it never evicts")
    if found.maxmemory > 0:
        return Line("queue eviction", "bad", f"it may throw jobs away ({found.policy})", remedy)
    return Line("queue eviction", "warn", f"with a memory limit it would throw jobs away ({found.policy})", remedy)


def _queue_persistence(found: ServerFacts) -> Line:
    if found.write_error is not None:
        text = f"it cannot keep its jobs on disk: {found.write_error}"
        return Line("queue persistence", "bad", text, "Look at its disk and its log.")
    if found.appends:
        return Line("queue persistence", "ok", "it keeps an append-only file")
    remedy = "Set appendonly yes. Events posted over HTTP are safe either way; what is published on the queue is not."
    if found.snapshots is None:
        return Line("queue persistence", "warn", "it keeps no append-only file, and does not say of snapshots", remedy)
    kept = "it keeps snapshots only" if found.snapshots else "it keeps nothing on disk"
    return Line("queue persistence", "warn", f"{kept}: a restart loses jobs that no worker has taken up", remedy)


def _worker(found: ServerFacts) -> Line:
    if found.databases > 1:
        text = f"workers of {found.databases} databases take one another's jobs from this queue"
        return Line("worker", "bad", text, "Give each service a PROFILES_QUEUE_NAME of its own.")
    if found.worker_alive:
        return Line("worker", "ok", "a worker has shown itself within the last seconds")
    remedy = "Start `profiles worker`. Until then events wait, unconsumed; reads are not affected."
    return Line("worker", "bad", "no worker has shown itself within the last seconds", remedy)
