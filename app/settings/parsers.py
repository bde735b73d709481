"""What a setting's text may be: parsers from the environment's strings to values.

Each raises `ValueError` with what is allowed, and never with what was given where that may be a secret.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
SCOPES = ("read", "write", "admin")
_URL_OPTIONS = ("db", "sentinel", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the service knows it: never the key itself, only its SHA-256 (32 bytes)."""

    name: str
    scopes: frozenset[str]
    sha256: bytes


@dataclass(frozen=True, slots=True)
class RolloutRails:
    """What a roll-out tolerates: `dismissed` more, as a share of all decisions; the time of 99 in 100 answers; a share
    of decisions without a profile."""

    dismissed: float = 0.03
    p99_ms: float = 100.0
    no_profile: float = 0.5

    def __str__(self) -> str:
        return ",".join(f"{item.name}={getattr(self, item.name):g}" for item in fields(self))


def path(value: str) -> Path:
    """A file path. `~` is the home directory, and a symbolic link counts as the file that it leads to."""
    if not value or "\0" in value:
        raise ValueError("must be a file path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", value):
        raise ValueError("must be the path of a SQLite file; no other database is supported")
    try:
        found = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a file path: {error}") from None
    # SQLite keeps its log beside the file itself, not beside the link.
    return found.resolve() if found.is_symlink() else found


def registry_source(value: str) -> str | None:
    """Where a registry is: a module or a file of Python, and a name in it; empty is none."""
    if value == "":
        return None
    place, _, name = value.rpartition(":")
    module = all(part.isidentifier() for part in place.split("."))
    if not name.isidentifier() or not (module or (place.endswith(".py") and "\0" not in place)):
        raise ValueError("must be package.module:NAME or /path/features.py:NAME")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number within these bounds."""

    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    """One of these words."""

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return parse


def switch(value: str) -> bool:
    """0 or 1."""
    if value not in ("0", "1"):
        raise ValueError("must be 0 or 1")
    return value == "1"


def redis_url(value: str) -> str | None:
    """An address of a Redis or Valkey; empty is none."""
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
    for name, given in parse_qsl(parts.query, keep_blank_values=True):
        # The others change what the service relies on, as timeouts and encodings, or make TLS worthless.
        if name not in _URL_OPTIONS or not given:
            known = ", ".join(_URL_OPTIONS)
            raise ValueError(f"the option {name!r} is not allowed, or has no value; allowed are {known}")
        if name == "db" and not re.fullmatch(r"[0-9]{1,4}", given):
            raise ValueError("the option 'db' must be a number")
    return value


def queue_name(value: str) -> str:
    """The name of a queue, which becomes a part of keys."""
    if not re.fullmatch(r"[A-Za-z0-9:_.\-]{1,100}", value):
        raise ValueError("must be 1 to 100 of A-Z a-z 0-9 : _ . -")
    return value


def model_url(value: str) -> str | None:
    """The base address of a chat-completions endpoint, without a slash at its end, or the whole one; empty is none."""
    if value == "":
        return None
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("must be a URL with a port from 1 to 65535, as https://host/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("must start with http:// or https:// and name a host, as https://host/v1")
    if "@" in parts.netloc:
        raise ValueError("must hold no user and no password; the key belongs into PROFILES_MODEL_KEY")
    if "?" in value or "#" in value or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("must end with its path, as https://host/v1; no query, no fragment, nothing but ASCII")
    return value.rstrip("/").removesuffix("/chat/completions")


def model_name(value: str) -> str | None:
    """A model's name, as its endpoint knows it; empty is none."""
    if value and not re.fullmatch(r"[\x21-\x7e]{1,200}", value):
        raise ValueError("must be 1 to 200 ASCII characters without spaces")
    return value or None


def secret(value: str) -> str | None:
    """What may stand in a header; empty is none. The message does not show it."""
    if value and not re.fullmatch(r"[\x21-\x7e]{1,4096}", value):
        raise ValueError("must be ASCII without spaces, as a header holds it")
    return value or None


def host(value: str) -> str:
    """An address or a host name, as a socket takes it."""
    if not re.fullmatch(r"[0-9A-Za-z.:\-]{1,253}", value):
        raise ValueError("must be an address or a host name")
    return value


def root_path(value: str) -> str:
    """A path without a slash at its end; empty where the service is at the root."""
    if not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_.~\-]+)*/?", value):
        raise ValueError("must be a path, as /profiles: A-Z a-z 0-9 _ . ~ - after each slash")
    return value.removesuffix("/")


def networks(value: str) -> tuple[Network, ...]:
    """Comma-separated addresses and networks."""
    items = filter(None, (part.strip() for part in value.split(",")))
    try:
        return tuple(ipaddress.ip_network(item) for item in items)
    except ValueError as error:
        raise ValueError(f"must be addresses or networks, as 127.0.0.1,10.0.0.0/8: {error}") from None


def api_keys(value: str) -> tuple[ApiKey, ...]:
    """Comma-separated `name:scope+scope:sha256hex`. Messages show no more of a key than its name."""
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


def _assignments(value: str) -> Iterator[tuple[str, str]]:
    """Comma-separated `name=text`, each name once."""
    named: set[str] = set()
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, _, text = part.partition("=")
        if name in named:
            raise ValueError(f"{name} is named twice")
        named.add(name)
        yield name, text


def rewards(value: str) -> tuple[tuple[str, float], ...]:
    """Comma-separated `outcome=reward`. `app.bandit.learning.rewards` knows the outcomes and checks their names."""
    given: list[tuple[str, float]] = []
    for name, text in _assignments(value):
        try:
            given.append((name, share(text)))
        except ValueError as error:
            raise ValueError(f"the reward of {name} {error}") from None
    return tuple(given)


def share(value: str) -> float:
    """A number from 0 to 1."""
    if not re.fullmatch(r"[01]|[01]?\.[0-9]{1,9}", value) or not float(value) <= 1:
        raise ValueError("must be a number from 0 to 1")
    return float(value)


def rollout_rails(value: str) -> RolloutRails:
    """Comma-separated `guardrail=limit`; what is not named keeps its default."""
    names = [item.name for item in fields(RolloutRails)]
    given: dict[str, float] = {}
    for name, text in _assignments(value):
        if name not in names:
            raise ValueError(f"must be guardrail=limit, comma-separated; guardrails are {', '.join(names)}")
        if name == "p99_ms":
            if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
                raise ValueError(f"{name} must be a whole number of milliseconds from 1 to 999999")
            given[name] = float(text)
        else:
            try:
                given[name] = share(text)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return RolloutRails(**given)
