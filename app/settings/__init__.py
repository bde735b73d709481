"""Every setting, read once from the environment, validated, immutable.

Each field of `Settings` is the setting `PROFILES_<FIELD>`; its metadata holds the parser and the text that the README
and `profiles --help` show. A variable that starts with `PROFILES_` but is unknown is rejected: a typo must not pass
for a default. This module must not know what the settings are for.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from app.errors import SettingsError
from app.settings import parsers
from app.settings.parsers import ApiKey, Network, RolloutRails

# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
PREFIX = "PROFILES_"
_SHOWN = 80
_PASSWORD = re.compile(r"//[^/]*@")
MIN_RETENTION_MARGIN_DAYS = 30
MIN_DECISION_MARGIN_DAYS = 3


def _setting(default: Any, parse: Callable[[str], Any], text: str, *, secret: bool = False) -> Any:
    """`secret`: the value is, or may hold, a password or a key, and is not shown."""
    return field(default=default, metadata={"parse": parse, "text": text}, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings. Build one with `Settings.from_environment`, or by keyword in a test."""

    database: Path = _setting(Path("var/profiles.db"), parsers.path, "The SQLite file with the events.")
    features: str | None = _setting(
        None,
        parsers.registry_source,
        "Your own registry: package.module:NAME or /path/features.py:NAME; empty: the one that comes with the service.",
    )
    cache_url: str | None = _setting(
        None,
        parsers.redis_url,
        "Redis or Valkey for the cached features; it may evict. redis://, rediss:// or unix://.",
        secret=True,
    )
    queue_url: str | None = _setting(
        None,
        parsers.redis_url,
        "Redis or Valkey for the job queue; it must not evict. redis://, rediss:// or unix://.",
        secret=True,
    )
    queue_name: str = _setting(
        "arq:queue",
        parsers.queue_name,
        "The queue on that server; services with different databases need one each.",
    )
    host: str = _setting("127.0.0.1", parsers.host, "Address to serve on. Anything but loopback needs API keys.")
    port: int = _setting(8000, parsers.whole(1, 65535), "Port to serve on.")
    root_path: str = _setting(
        "",
        parsers.root_path,
        "The path under which a proxy in front shows the service, as /profiles; the proxy may strip it or pass it on.",
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        (),
        parsers.networks,
        "Comma-separated addresses or networks of proxies whose X-Forwarded-For, -Proto, -Host, -Prefix are believed.",
    )
    api_keys: tuple[ApiKey, ...] = _setting(
        (),
        parsers.api_keys,
        "Comma-separated name:scope+scope:sha256hex; make one with `profiles keys new`.",
        secret=True,
    )
    rate_limit: int = _setting(
        0, parsers.whole(0, 1_000_000), "Requests a second of each key, for a process; 0: no limit."
    )
    rate_burst: int = _setting(
        0, parsers.whole(0, 1_000_000), "Requests of a key at once, after a pause; 0: as in a second."
    )
    drain_s: int = _setting(
        0, parsers.whole(0, 300), "Seconds for which /readyz says `stopping` before an API process stops."
    )
    keep_alive_s: int = _setting(
        75,
        parsers.whole(1, 3_600),
        "Seconds before an idle connection is closed; more than the balancer in front keeps its own.",
    )
    session_hours: int = _setting(
        12, parsers.whole(1, 720), "Hours that an admin stays signed in to the pages under /admin."
    )
    retention_days: int = _setting(
        180, parsers.whole(1, 36500), "Days that events are kept; at least the longest feature window + 30."
    )
    decision_retention_days: int = _setting(
        180,
        parsers.whole(1, 36500),
        "Days that decisions of /score are kept; at least the reward window + 3.",
    )
    rewards: tuple[tuple[str, float], ...] = _setting(
        (), parsers.rewards, "Rewards other than the actions' own: outcome=reward, 0 to 1; none: no feedback."
    )
    reward_window_hours: int = _setting(
        24, parsers.whole(1, 720), "Hours after a tip was served in which its feedback is learned."
    )
    shadow: bool = _setting(
        True, parsers.switch, "1: the challenger scores every decision in the shadow; 0: there is none."
    )
    rollout_margin: float = _setting(
        0.02, parsers.share, "Reward a decision, 0 to 1, that the challenger may cost and still be ramped."
    )
    rollout_guardrails: RolloutRails = _setting(
        RolloutRails(),
        parsers.rollout_rails,
        "What rolls a ramped challenger back: dismissed more, p99 of answers in ms, share without a profile.",
    )
    log_format: Literal["console", "json"] = _setting("console", parsers.choice("console", "json"), "console or json.")
    log_level: str = _setting(
        "info", parsers.choice("debug", "info", "warning", "error"), "debug, info, warning or error."
    )
    cache_timeout_ms: int = _setting(
        100,
        parsers.whole(5, 60_000),
        "Milliseconds before a cache command counts as failed and a read goes on without.",
    )
    lease_ms: int = _setting(
        5_000, parsers.whole(50, 600_000), "Milliseconds a reader may take between its token and its fill."
    )
    statement_timeout_ms: int = _setting(
        2_000,
        parsers.whole(50, 600_000),
        "Milliseconds a statement that computes features may run; a feature that takes longer is answered as null.",
    )
    readers: int = _setting(2, parsers.whole(1, 64), "SQLite read connections, a thread each.")
    near_users: int = _setting(
        10_000,
        parsers.whole(0, 10_000_000),
        "Users whose profiles an API process keeps in its own memory; 0: none.",
    )
    audit_users: int = _setting(
        5,
        parsers.whole(0, 1_000),
        "Users a second whose cached profile a worker checks after an event, thrice; 0: none.",
    )
    worker_metrics_port: int = _setting(
        8001,
        parsers.whole(0, 65535),
        "Port on which the worker serves its metrics, on PROFILES_HOST; 0 serves none.",
    )
    embedded_cache_mb: int = _setting(
        256, parsers.whole(1, 1_000_000), "Memory limit of the embedded cache that `profiles up` starts, in MiB."
    )
    model_url: str | None = _setting(
        None,
        parsers.model_url,
        "Base URL of an OpenAI-compatible endpoint that words tips, as https://host/v1; without one templates do.",
        secret=True,
    )
    model: str | None = _setting(None, parsers.model_name, "The model that is asked for there.", secret=True)
    model_key: str | None = _setting(
        None, parsers.secret, "The key that is sent there, where it wants one.", secret=True
    )
    model_calls: int = _setting(16, parsers.whole(1, 1_000), "Calls of the model under way at once, for a process.")
    demo: bool = _setting(
        True, parsers.switch, "1 lets `profiles up` load the demonstration set into a new database; 0 not."
    )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check every setting.

        Raises:
            SettingsError: naming the first setting at fault, and what it allows.
        """
        environ = _own(os.environ if environ is None else environ)
        known = {variable(item): item for item in fields(cls)}
        for name in sorted(environ):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"settings are {', '.join(known)}"
                raise SettingsError(name, f"unknown setting; {hint}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            if name not in environ:
                continue
            try:
                values[item.name] = item.metadata["parse"](environ[name])
            except ValueError as error:
                given = _PASSWORD.sub("//…@", environ[name])[:_SHOWN]
                raise SettingsError(name, f"{error} (given: {given!r})" if item.repr else str(error)) from None
        return cls(**values)

    def require_retention(self, longest_window_ms: int) -> None:
        """Raise `SettingsError` if a feature's window could reach into pruned history."""
        window_days = -(-longest_window_ms // 86_400_000)
        least = window_days + MIN_RETENTION_MARGIN_DAYS
        if self.retention_days < least:
            raise SettingsError(
                "PROFILES_RETENTION_DAYS",
                f"must be at least {least}: the longest feature window is {window_days} days, "
                f"and {MIN_RETENTION_MARGIN_DAYS} more are kept",
            )

    def require_decision_retention(self) -> None:
        """Raise `SettingsError` if a decision could be pruned before its reward is known."""
        least = -(-self.reward_window_hours // 24) + MIN_DECISION_MARGIN_DAYS
        if self.decision_retention_days < least:
            raise SettingsError(
                "PROFILES_DECISION_RETENTION_DAYS",
                f"must be at least {least}: the reward window is {self.reward_window_hours} hours, and "
                f"{MIN_DECISION_MARGIN_DAYS} days more are kept",
            )

    def require_servers(self) -> None:
        """Raise `SettingsError` if cache or queue is not set (only `profiles up` can do without)."""
        for name, url in (("PROFILES_CACHE_URL", self.cache_url), ("PROFILES_QUEUE_URL", self.queue_url)):
            if url is None:
                raise SettingsError(
                    name,
                    "must be set, for instance redis://127.0.0.1:6379/0; only `profiles up` starts its own servers",
                )

    def require_whole_model(self) -> None:
        """Raise `SettingsError` if only a part of the model's address, name and key is set."""
        if self.model_url is None and (self.model is not None or self.model_key is not None):
            raise SettingsError("PROFILES_MODEL_URL", "must be set if PROFILES_MODEL or PROFILES_MODEL_KEY is")
        if self.model_url is not None and self.model is None:
            raise SettingsError("PROFILES_MODEL", "must name a model if PROFILES_MODEL_URL is set")

    def require_safe_binding(self) -> None:
        """Raise `SettingsError` if other machines could reach the service without a key."""
        if self.api_keys or (is_loopback(self.host) and not self.trusted_proxies):
            return
        cause = "PROFILES_TRUSTED_PROXIES is set" if is_loopback(self.host) else f"PROFILES_HOST is {self.host}"
        raise SettingsError(
            "PROFILES_API_KEYS",
            f"must hold at least one key when {cause}: without keys the service serves only on a loopback address, and "
            "to this machine (make a key with `profiles keys new`)",
        )


def variable(item: Field[Any]) -> str:
    """The environment variable of a field of `Settings`."""
    return PREFIX + item.name.upper()


def described() -> list[tuple[str, str, str]]:
    """(variable, default as text, explanation) of every setting, in the order of declaration."""
    rows: list[tuple[str, str, str]] = []
    for item in fields(Settings):
        default = item.default
        shown = "" if default in (None, ()) else str(int(default)) if isinstance(default, bool) else str(default)
        rows.append((variable(item), shown, cast(str, item.metadata["text"])))
    return rows


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hash_key(key: str) -> bytes:
    """SHA-256 of an API key, as the settings store it."""
    return hashlib.sha256(key.encode()).digest()


def _own(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are meant for this service.

    Kubernetes gives every pod the addresses of the Services in its namespace: of one named `profiles` as PROFILES_PORT,
    PROFILES_SERVICE_HOST and so on.
    """
    own = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return own
    return {
        name: value
        for name, value in own.items()
        if not (_SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and "://" in value))
    }
