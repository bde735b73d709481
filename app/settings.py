"""Every setting, read once from the environment, validated, immutable.

Each field of `Settings` is the setting `PROFILES_<FIELD>`; its metadata holds the parser and the text that the README
and `profiles --help` show. A variable that starts with `PROFILES_` and is no setting is refused: a typo must not pass
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
from urllib.parse import urlsplit

from app.errors import SettingsError

PREFIX = "PROFILES_"
SCOPES = ("read", "write", "admin")
MIN_RETENTION_MARGIN_DAYS = 30


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the service knows it: never the key itself, only its SHA-256 (32 bytes)."""

    name: str
    scopes: frozenset[str]
    sha256: bytes


def _text(value: str) -> str:
    return value


def _path(value: str) -> Path:
    if not value or "\0" in value:
        raise ValueError("must be a file path")
    return Path(value)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def _switch(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return value == "1"


def _redis_url(value: str) -> str | None:
    if value == "":
        return None
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL with a port from 1 to 65535, as redis://host:6379/0") from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must start with redis://, rediss:// or unix://")
    if parts.scheme == "unix":
        if not parts.path:
            raise ValueError("must name a socket: unix:///path/to/socket")
    elif not parts.hostname or port == 0 or not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        raise ValueError(f"must name a host, and may name a port and a database: {parts.scheme}://host:6379/0")
    return value


def _host(value: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z.:\-]{1,253}", value):
        raise ValueError("must be an address or a host name")
    return value


def _api_keys(value: str) -> tuple[ApiKey, ...]:
    keys: list[ApiKey] = []
    for number, item in enumerate(filter(None, (part.strip() for part in value.split(","))), start=1):
        parts = item.split(":")
        if len(parts) != 3:
            raise ValueError(f"key {number} must be name:scope+scope:sha256hex")
        name, scopes, digest = parts
        if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", name):
            raise ValueError(f"key {number}: the name must be 1 to 64 of A-Z a-z 0-9 _ . -")
        if not set(scopes.split("+")) <= set(SCOPES):
            # Not shown: it may be the key itself, in the wrong place.
            raise ValueError(f"key {name}: unknown scope; allowed are {', '.join(SCOPES)}, joined by +")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ValueError(f"key {name}: the last part must be a SHA-256 in 64 lower-case hex digits")
        if any(key.name == name for key in keys):
            raise ValueError(f"key {name}: the name repeats")
        if any(key.sha256.hex() == digest for key in keys):
            raise ValueError(f"key {name}: the same key under another name; give each its own")
        keys.append(ApiKey(name, frozenset(scopes.split("+")), bytes.fromhex(digest)))
    return tuple(keys)


def _setting(default: Any, parse: Callable[[str], Any], text: str) -> Any:
    return field(default=default, metadata={"parse": parse, "text": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings. Build one with `Settings.from_environment`, or by keyword in a test."""

    database: Path = _setting(Path("var/profiles.db"), _path, "The SQLite file with the events.")
    cache_url: str | None = _setting(
        None, _redis_url, "Redis or Valkey for the cached features; it may evict. redis://, rediss:// or unix://."
    )
    queue_url: str | None = _setting(
        None, _redis_url, "Redis or Valkey for the job queue; it must not evict. redis://, rediss:// or unix://."
    )
    host: str = _setting("127.0.0.1", _host, "Address to serve on. Anything but loopback needs API keys.")
    port: int = _setting(8000, _whole(1, 65535), "Port to serve on.")
    api_keys: tuple[ApiKey, ...] = _setting(
        (), _api_keys, "Comma-separated name:scope+scope:sha256hex; make one with `profiles keys new`."
    )
    rate_limit: int = _setting(
        0, _whole(0, 1_000_000), "Requests a second that each key may send to one API process; 0: no limit."
    )
    rate_burst: int = _setting(
        0, _whole(0, 1_000_000), "Requests that a key may send at once, after a pause; 0: those of one second."
    )
    session_hours: int = _setting(12, _whole(1, 720), "Hours that an admin stays signed in to the pages under /admin.")
    retention_days: int = _setting(
        180, _whole(1, 36500), "Days that events are kept; at least the longest feature window + 30."
    )
    log_format: Literal["console", "json"] = _setting("console", _choice("console", "json"), "console or json.")
    log_level: str = _setting("info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error.")
    cache_timeout_ms: int = _setting(
        100, _whole(5, 60_000), "Milliseconds before a cache command counts as failed and a read goes on without."
    )
    lease_ms: int = _setting(
        5_000, _whole(50, 600_000), "Milliseconds a reader may take between its token and its fill."
    )
    readers: int = _setting(2, _whole(1, 64), "SQLite read connections, a thread each.")
    near_users: int = _setting(
        10_000, _whole(0, 10_000_000), "Users whose profiles an API process keeps in its own memory; 0: none."
    )
    audit_users: int = _setting(
        5, _whole(0, 1_000), "Users a second whose cached profile a worker checks after an event, thrice; 0: none."
    )
    worker_metrics_port: int = _setting(
        8001, _whole(0, 65535), "Port on which the worker serves its metrics, on PROFILES_HOST; 0 serves none."
    )
    embedded_cache_mb: int = _setting(
        256, _whole(1, 1_000_000), "Memory limit of the embedded cache that `profiles up` starts, in MiB."
    )
    demo: bool = _setting(True, _switch, "1 lets `profiles up` load the demonstration set into a new database; 0 not.")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check every setting.

        Raises:
            SettingsError: naming the first setting at fault, and what it allows.
        """
        environ = os.environ if environ is None else environ
        known = {variable(item): item for item in fields(cls)}
        for name in sorted(environ):
            if name.startswith(PREFIX) and name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"settings are {', '.join(known)}"
                raise SettingsError(name, f"is no setting; {hint}")
        values: dict[str, Any] = {}
        for name, item in known.items():
            if name not in environ:
                continue
            try:
                values[item.name] = item.metadata["parse"](environ[name])
            except ValueError as error:
                raise SettingsError(name, str(error)) from None
        return cls(**values)

    def require_retention(self, longest_window_days: int) -> None:
        """Raise `SettingsError` where a feature's window could reach into pruned history."""
        least = longest_window_days + MIN_RETENTION_MARGIN_DAYS
        if self.retention_days < least:
            raise SettingsError(
                "PROFILES_RETENTION_DAYS",
                f"must be at least {least}: the longest feature window is {longest_window_days} days, "
                f"and {MIN_RETENTION_MARGIN_DAYS} more are kept",
            )

    def require_servers(self) -> None:
        """Raise `SettingsError` where cache or queue is not named (only `profiles up` can do without)."""
        for name, url in (("PROFILES_CACHE_URL", self.cache_url), ("PROFILES_QUEUE_URL", self.queue_url)):
            if url is None:
                raise SettingsError(
                    name,
                    "must be set, for instance redis://127.0.0.1:6379/0; only `profiles up` starts its own servers",
                )

    def require_safe_binding(self) -> None:
        """Raise `SettingsError` where the service would be open to others without any key."""
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsError(
                "PROFILES_API_KEYS",
                f"must hold at least one key when PROFILES_HOST is {self.host}: without keys the service serves only "
                "on a loopback address (make a key with `profiles keys new`)",
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
