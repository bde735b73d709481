"""The settings: environment variables, read and validated once at start-up.

Each field of `Settings` is the variable `PROFILES_<FIELD>`, which `docker/README.md` describes. An unknown `PROFILES_…`
variable is an error, so that a typo does not silently select a default. For settings that may hold a secret,
`PROFILES_<FIELD>_FILE` names a file with the value, such as a Docker or Kubernetes secret.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from app.errors import SettingsError
from app.settings import parsers
from app.settings.parsers import ApiKey, Network, PostgresUrl, RolloutRails

# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
PREFIX = "PROFILES_"
FILE = "_FILE"
_SHOWN = 80


def _setting(default: Any, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    """Declare a field of `Settings`. `parse` converts the variable's text, and raises `ValueError` if it is invalid. If
    `default` is None, an empty text also means None. If `secret`, errors and `repr` do not show the value."""
    return field(default=default, metadata={"parse": parse}, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of a process, immutable. Use `Settings.from_environment`, or keywords in a test.

    Raises `SettingsError` if the URL of the model is set without its name, or the name or the key without the URL."""

    database: Path | PostgresUrl = _setting(Path("var/profiles.db"), parsers.database, secret=True)
    features: str | None = _setting(None, parsers.registry_source)
    cache_url: str | None = _setting(None, parsers.cache_url, secret=True)
    queue_url: str | None = _setting(None, parsers.queue_url, secret=True)
    queue_name: str = _setting("arq:queue", parsers.queue_name)
    host: str = _setting("127.0.0.1", parsers.host)
    port: int = _setting(8000, parsers.whole(1, 65535))
    processes: int = _setting(1, parsers.whole(1, 64))
    root_path: str = _setting("", parsers.root_path)
    trusted_proxies: tuple[Network, ...] = _setting((), parsers.networks)
    api_keys: tuple[ApiKey, ...] = _setting((), parsers.api_keys, secret=True)
    rate_limit: int = _setting(0, parsers.whole(0, 1_000_000))  # 0: no limit
    rate_burst: int = _setting(0, parsers.whole(0, 1_000_000))  # 0: as `rate_limit`
    drain_s: int = _setting(0, parsers.whole(0, 300))
    keep_alive_s: int = _setting(75, parsers.whole(1, 3_600))
    session_hours: int = _setting(12, parsers.whole(1, 720))
    retention_days: int = _setting(180, parsers.whole(1, 36500))
    decision_retention_days: int = _setting(180, parsers.whole(1, 36500))
    rewards: tuple[tuple[str, float], ...] = _setting((), parsers.rewards)
    reward_window_hours: int = _setting(24, parsers.whole(1, 720))
    scoring: bool = _setting(find_spec("numpy") is not None, parsers.scoring)
    shadow: bool = _setting(True, parsers.switch)
    rollout_margin: float = _setting(0.02, parsers.share)
    rollout_guardrails: RolloutRails = _setting(RolloutRails(), parsers.rollout_rails)
    log_format: Literal["console", "json"] = _setting("console", parsers.choice("console", "json"))
    log_level: str = _setting("info", parsers.choice("debug", "info", "warning", "error"))
    traces_url: str | None = _setting(None, parsers.traces_url, secret=True)
    cache_timeout_ms: int = _setting(100, parsers.whole(5, 60_000))
    lease_ms: int = _setting(5_000, parsers.whole(50, 600_000))
    statement_timeout_ms: int = _setting(2_000, parsers.whole(50, 600_000))
    readers: int = _setting(2, parsers.whole(1, 64))
    near_users: int = _setting(10_000, parsers.whole(0, 10_000_000))  # 0: no local cache
    audit_users: int = _setting(5, parsers.whole(0, 1_000))  # per second, and as many decisions; 0: none
    metrics_port: int = _setting(0, parsers.whole(0, 65535))  # 0: not served
    worker_metrics_port: int = _setting(8001, parsers.whole(0, 65535))  # 0: not served
    embedded_cache_mb: int = _setting(256, parsers.whole(1, 1_000_000))
    model_url: str | None = _setting(None, parsers.model_url, secret=True)
    model: str | None = _setting(None, parsers.model_name, secret=True)
    model_key: str | None = _setting(None, parsers.secret, secret=True)
    model_calls: int = _setting(16, parsers.whole(1, 1_000))
    demo: bool = _setting(True, parsers.switch)

    def __post_init__(self) -> None:
        if self.model_url is None and (self.model is not None or self.model_key is not None):
            raise SettingsError("PROFILES_MODEL_URL", "must be set if PROFILES_MODEL or PROFILES_MODEL_KEY is set")
        if self.model_url is not None and self.model is None:
            raise SettingsError("PROFILES_MODEL", "must name a model, because PROFILES_MODEL_URL is set")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and validate `PROFILES_…` variables. Raises `SettingsError` for the first that is invalid."""
        environ = _own(os.environ if environ is None else environ)
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        environ = _with_files(environ, [name for name, item in known.items() if not item.repr])
        for name in sorted(environ):
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known settings are {', '.join(known)}"
                raise SettingsError(name, f"unknown setting; {hint}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            text = environ.get(name)
            if text is None or (not text and item.default is None):
                continue
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as error:
                shown = f" (given: {text[:_SHOWN]!r})" if item.repr else ""
                raise SettingsError(name, f"{error}{shown}") from None
        return cls(**values)

    @property
    def directory(self) -> Path:
        """The directory of the SQLite file. With PostgreSQL: the directory `var`, where `profiles up` keeps files."""
        return self.database.parent if isinstance(self.database, Path) else Path("var")

    def require_file(self, instead: str = "this command needs a SQLite file") -> Path:
        """The SQLite file. Raises `SettingsError`, with `instead` in its message, if the database is PostgreSQL."""
        if isinstance(self.database, Path):
            return self.database
        raise SettingsError("PROFILES_DATABASE", f"names a PostgreSQL database; {instead}")

    def require_retention(self, longest_window_ms: int) -> None:
        """Raise `SettingsError` if pruning could delete events of a window, or decisions before their reward."""
        window_days, hours = -(-longest_window_ms // 86_400_000), self.reward_window_hours
        window, rewards = f"longest feature window of {window_days} days", f"reward window of {hours} hours"
        _require_days("PROFILES_RETENTION_DAYS", self.retention_days, window_days, 30, window)
        _require_days("PROFILES_DECISION_RETENTION_DAYS", self.decision_retention_days, -(-hours // 24), 3, rewards)

    def require_servers(self) -> None:
        """Raise `SettingsError` if the URL of the cache or of the queue is not set."""
        for name, url in (("PROFILES_CACHE_URL", self.cache_url), ("PROFILES_QUEUE_URL", self.queue_url)):
            if url is None:
                example = "redis://127.0.0.1:6379/0"
                raise SettingsError(name, f"must be set, such as {example}; only `profiles up` starts its own servers")

    def require_safe_binding(self) -> None:
        """Raise `SettingsError` if other machines could reach the service, and no API keys are set."""
        if self.api_keys or (is_loopback(self.host) and not self.trusted_proxies):
            return
        cause = "PROFILES_TRUSTED_PROXIES is set" if is_loopback(self.host) else f"PROFILES_HOST is {self.host}"
        raise SettingsError(
            "PROFILES_API_KEYS",
            f"must hold at least one key when {cause}: without keys the service binds only to a loopback address and "
            "trusts no proxy (`profiles keys new` makes a key)",
        )


def _require_days(name: str, days: int, needed: int, margin: int, span: str) -> None:
    if days < needed + margin:
        raise SettingsError(name, f"must be at least {needed + margin}: the {span} plus a margin of {margin} days")


def is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _with_files(environ: Mapping[str, str], secret: Collection[str]) -> dict[str, str]:
    """The variables, with `<name>_FILE` of each secret setting replaced by `<name>` and the content of the file."""
    values = dict(environ)
    for name in environ:
        setting = name.removesuffix(FILE)
        if setting == name or setting not in secret:
            continue
        if environ.get(setting):
            raise SettingsError(name, f"cannot be combined with {setting}; set one of them")
        try:
            values[setting] = Path(values.pop(name)).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(name, f"names a file that cannot be read: {error}") from None
        if not values[setting]:  # an empty file of API keys would switch authentication off
            raise SettingsError(name, "names an empty file")
    return values


def _own(environ: Mapping[str, str]) -> dict[str, str]:
    """The `PROFILES_…` variables, without those that Kubernetes adds. Kubernetes gives every pod the addresses of the
    Services in its namespace. For a Service named `profiles` it sets PROFILES_PORT, PROFILES_SERVICE_HOST and so on."""
    own = {name: value for name, value in environ.items() if name.startswith(PREFIX)}
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return own
    return {
        name: value
        for name, value in own.items()
        if not (_SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and "://" in value))
    }
