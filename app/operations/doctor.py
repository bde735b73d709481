"""Checks of `profiles doctor`. Those of databases and servers are in the modules `diagnostics` of `app.stores`."""

import resource
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from app.operations.findings import mixed_registries
from app.operations.samples import Sample
from app.settings import Settings, hash_key, is_loopback

_WORDS = (
    "key api apikey api-key api_key secret password pass passwd token test testing admin administrator root user guest "
    "default demo dev development prod production read write reader writer profiles profile recommender worker "
    "changeme change-me letmein welcome hello qwerty abc123 123 1234 12345 123456 12345678 123456789"
)
SKEW_WARN_MS, SKEW_BAD_MS = 1_000, 30_000
OPEN_FILES_WARN, OPEN_FILES_BAD = 4_096, 256
NOT_MIGRATED = "Stop the service and run `profiles migrate`, or use the release that the database belongs to."
WEAK_KEY = "Make a new one with `profiles keys new`, and remove this one from PROFILES_API_KEYS."


class Line(NamedTuple):
    """The result of one check. `check` is its stable name, for scripts; `remedy` is empty if the state is ok."""

    check: str
    state: Literal["ok", "warn", "bad"]
    text: str
    remedy: str = ""


def diagnose_keys(settings: Settings) -> list[Line]:
    """Check that API keys are configured, that at least one has the scope admin, and that none is a common word."""
    keys = settings.api_keys
    if not keys and is_loopback(settings.host):
        text = "none are configured: every user of this machine has full access"
        return [Line("keys", "warn", text, "Set PROFILES_API_KEYS, unless you are the only user of this machine.")]
    if not keys:
        text = f"none are configured, and PROFILES_HOST is {settings.host}: the service refuses to start"
        return [Line("keys", "bad", text, "Make one with `profiles keys new`.")]
    if admins := sum("admin" in key.scopes for key in keys):
        admin = Line("keys", "ok", f"{len(keys)} configured, {admins} with the scope admin")
    else:
        remedy = "Make one with `profiles keys new NAME --scope admin`."
        admin = Line("keys", "warn", "none has the scope admin, so no admin can sign in to the pages", remedy)
    words = {"", *_WORDS.split(), *(key.name for key in keys)}
    digests = {hash_key(form) for word in words for form in (word, word.upper(), word.capitalize())}
    weak = [
        Line("weak keys", "bad", f"key {key.name} is a common word or the name of a key, and easily guessed", WEAK_KEY)
        for key in keys
        if key.sha256 in digests
    ]
    return [admin, *(weak or [Line("weak keys", "ok", f"none of {len(keys)} is a common word")])]


def diagnose_features(running: Sequence[Sample], disabled: Mapping[str, str]) -> Line:
    """Report features that fail in the newest samples of `running` processes, and those that are `disabled`."""
    off = "; ".join(f"{name} is {how}" for name, how in disabled.items())
    views = [view for sample in running if (view := sample.components.get("features")) is not None]
    failing = sorted({view.detail for view in views if view.state in ("degraded", "down")})
    if failing:
        remedy = "Correct the definition, or disable the feature: /admin/features or `profiles features disable NAME`."
        return Line("features", "bad", "; ".join([*failing, *filter(None, [off])]), remedy)
    if off:
        remedy = "Once it is corrected, enable it: /admin/features or `profiles features enable NAME`."
        return Line("features", "warn", f"{off}; it is served as null", remedy)
    fails = "none fails" if views else "no running process computes them"
    return Line("features", "ok", f"{fails}, and none is disabled")


def diagnose_registry(own: str, running: Sequence[Sample]) -> Line:
    """Compare the registries of running processes, by their newest samples, with that of these settings (`own`)."""
    for finding in mixed_registries(running):
        return Line("registry", "warn", finding.text[0].lower() + finding.text[1:-1], finding.advice)
    served = {sample.registry for sample in running if sample.registry}
    if not served:
        return Line("registry", "ok", f"{own} can be loaded; no running process reports the one that it serves")
    if served != {own}:
        text = f"running processes serve the registry {served.pop()}, but these settings name {own}"
        remedy = "This is expected before a release. Otherwise set PROFILES_FEATURES as for the running processes."
        return Line("registry", "warn", text, remedy)
    return Line("registry", "ok", f"every running process serves {own}, as these settings do")


def diagnose_clock(name: str, before_s: float, theirs_s: float, after_s: float) -> Line:
    """Compare a server's clock with this machine's, in seconds since 1970, read just before and after the server's."""
    ahead_ms = round((theirs_s - (before_s + after_s) / 2) * 1000)
    unsure_ms = round((after_s - before_s) * 500) + 1
    off_ms = max(0, abs(ahead_ms) - unsure_ms)
    if off_ms < SKEW_WARN_MS:
        difference_ms = max(unsure_ms, abs(ahead_ms))
        return Line(f"{name} clock", "ok", f"it differs from this machine's clock by at most {difference_ms} ms")
    text = f"it is {off_ms / 1000:,.1f} s {'ahead of' if ahead_ms > 0 else 'behind'} this machine's clock"
    remedy = "Synchronise both machines with NTP: events more than five minutes ahead are refused."
    return Line(f"{name} clock", "bad" if off_ms >= SKEW_BAD_MS else "warn", text, remedy)


def diagnose_open_files() -> Line:
    """Check the limit on open files of this process, because every connection needs one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = limit if limit != resource.RLIM_INFINITY else 2**31
    text = f"a process started from here may open {limit:,} files; every connection needs one"
    if limit >= OPEN_FILES_WARN:
        return Line("open files", "ok", text)
    remedy = "Raise the limit: ulimit -n 65536, LimitNOFILE= of systemd, or ulimits: of Compose."
    return Line("open files", "bad" if limit < OPEN_FILES_BAD else "warn", text, remedy)
