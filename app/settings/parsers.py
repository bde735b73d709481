"""Parsers of the texts of environment variables, one function for each kind of setting.

A parser raises a `ValueError` that says what is allowed. Its message never contains a value that may be secret.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
SCOPES = ("read", "write", "admin")
# The parts of an API key in the settings, and what each must be.
_API_KEY = (
    (r"[A-Za-z0-9_.\-]{1,64}", "the name must be 1 to 64 of A-Z a-z 0-9 _ . -"),
    (r"(read|write|admin)(\+(read|write|admin))*", "the scopes must be read, write or admin, joined by +"),
    (r"[0-9a-f]{64}", "the last part must be the SHA-256 of the key as 64 lower-case hex digits"),
)
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_NAME = r"[^\W\d]\w*"
_CLUSTERS = ("redis+cluster", "rediss+cluster")
# libpq allows more values of `target_session_attrs`. With `any`, reads could go to a standby, which may lag behind.
_POSTGRES_OPTIONS = {
    "target_session_attrs": "read-write|primary",
    "sslmode": "disable|allow|prefer|require|verify-ca|verify-full",
    "connect_timeout": "[0-9]{1,3}",
}


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """A PostgreSQL database. `url` is for libpq, and may contain a password; `shown` is for messages, without one."""

    url: str = field(repr=False)
    shown: str

    def __str__(self) -> str:
        return self.shown


class ApiKey(msgspec.Struct, frozen=True):
    """An API key as the settings hold it: its SHA-256 (32 bytes), never the key itself."""

    name: str
    scopes: frozenset[str]
    sha256: bytes


class RolloutRails(msgspec.Struct, frozen=True):
    """The guardrails of a roll-out: beyond these limits a challenger policy that serves users is rolled back.
    `dismissed`: the challenger's share of dismissed tips minus the champion's. `p99_ms`: the 99th percentile of the
    time to decide. `no_profile`: the share of decisions made without a profile."""

    dismissed: float = 0.03
    p99_ms: float = 100.0
    no_profile: float = 0.5

    def __str__(self) -> str:
        return ",".join(f"{item.name}={getattr(self, item.name):g}" for item in msgspec.structs.fields(self))


def database(value: str) -> Path | PostgresUrl:
    """Parse the path of a SQLite file, in which `~` is expanded, or a URL of PostgreSQL."""
    if value.startswith(("postgresql://", "postgres://")):
        return postgres_url(value)
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", value):
        raise ValueError("must be the path of a SQLite file or postgresql://…; no other database is supported")
    if not value or "\0" in value:
        raise ValueError("must be a file path")
    try:
        found = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"must be a file path: {error}") from None
    if os.path.isdir(found):  # noqa: PTH112  # `Path.is_dir` raises if a parent may not be searched
        raise ValueError("must be the path of a file, and is a directory")
    # SQLite places its log beside the target of a link, not beside the link.
    return found.resolve() if found.is_symlink() else found


def postgres_url(value: str) -> PostgresUrl:
    """Check a URL for libpq (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS). Raises
    `ValueError` if it is invalid, or if psycopg is not installed. The message does not contain the password."""
    try:
        from psycopg import ProgrammingError  # noqa: PLC0415  # optional
        from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
    except ImportError:
        raise ValueError("PostgreSQL needs psycopg: run pip install 'profiles[postgres]'") from None
    form = "must be postgresql://user@host:port/name?option=value, with %XX for each of / @ : ? # % in a password"
    try:
        given = {name: str(text) for name, text in conninfo_to_dict(value).items()}
    except ProgrammingError as error:
        # The other messages of libpq may quote the password.
        unknown = re.search(r"invalid URI query parameter: .*", str(error))
        raise ValueError(unknown[0] if unknown else form) from None
    if "@" in given.get("host", "") + given.get("dbname", ""):  # the rest of a password
        raise ValueError(form)
    for name, allowed in _POSTGRES_OPTIONS.items():
        if name in given and not re.fullmatch(allowed, given[name]):
            listed = f"one of {allowed.replace('|', ', ')}" if "|" in allowed else "a whole number of seconds"
            raise ValueError(f"the option {name!r} must be {listed}")
    ports = given.get("port", "").split(",")
    if not all(re.fullmatch("[0-9]{0,5}", port) and 1 <= int(port or 1) <= 65_535 for port in ports):
        raise ValueError("each port must be a whole number from 1 to 65535")
    if "passfile" in given and not Path(given["passfile"]).is_file():  # libpq would go on without a password
        raise ValueError("the option 'passfile' must name a file")
    hosts = (given.get("hostaddr") or given.get("host", "")).split(",")
    places = [f"{host}:{port}".rstrip(":") for host, port in zip_longest(hosts, ports, fillvalue=ports[-1])]
    user = f"{given['user']}@" if "user" in given else ""
    return PostgresUrl(value, f"postgresql://{user}{','.join(places)}/{given.get('dbname', '')}")


def _parser(
    pattern: str, allowed: str, convert: Callable[[str], T], check: Callable[[T], bool] = lambda _: True
) -> Callable[[str], T]:
    """Make a parser of texts that match a regular expression. `allowed` describes the texts in errors: "must be …"."""

    def parse(value: str) -> T:
        if re.fullmatch(pattern, value) and check(converted := convert(value)):
            return converted
        raise ValueError(f"must be {allowed}")

    return parse


def whole(low: int, high: int) -> Callable[[str], int]:
    return _parser(r"[0-9]{1,12}", f"a whole number from {low} to {high}", int, lambda number: low <= number <= high)


def choice(*allowed: str) -> Callable[[str], str]:
    return _parser("|".join(allowed), f"one of {', '.join(allowed)}", str)


share = _parser(r"[01]|[01]?\.[0-9]{1,9}", "a number from 0 to 1", float, lambda number: number <= 1)
_milliseconds = _parser(r"[1-9][0-9]{0,5}", "a whole number of milliseconds from 1 to 999999", float)
registry_source = _parser(
    rf"({_NAME}(\.{_NAME})*|[^\0]*\.py):{_NAME}", "package.module:NAME or /path/features.py:NAME", str
)
root_path = _parser(
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_.~\-]+)*/?",
    "a path such as /profiles: after each slash A-Z a-z 0-9 _ . ~ -",
    lambda path: path.removesuffix("/"),
)
queue_name = _parser(r"[A-Za-z0-9:_.\-]{1,100}", "1 to 100 of A-Z a-z 0-9 : _ . -", str)
host = _parser(r"[0-9A-Za-z.:\-]{1,253}", "an address or a host name", str)
model_name = _parser(r"[\x21-\x7e]{1,200}", "1 to 200 ASCII characters without spaces", str)
secret = _parser(r"[\x21-\x7e]{1,4096}", "1 to 4096 ASCII characters without spaces", str)  # fits in an HTTP header
switch = _parser("[01]", "0 or 1", lambda value: value == "1")


def scoring(value: str) -> bool:
    if switch(value) and find_spec("numpy") is None:
        raise ValueError("needs NumPy, which is not installed: run pip install 'profiles[scoring]'")
    return switch(value)


def _split_url(value: str, example: str) -> SplitResult:
    with suppress(ValueError):
        parts = urlsplit(value)
        # A URL of Sentinels or of a cluster names several hosts, which `urlsplit` does not expect.
        hosts = parts.netloc.rpartition("@")[2].split(",")
        if all(urlsplit(f"//{host}").port != 0 for host in hosts):  # raises `ValueError`, too
            return parts
    raise ValueError(f"must be a URL with a port from 1 to 65535, such as {example}")


def queue_url(value: str) -> str:
    """Check the URL of a Redis or Valkey server or of a Sentinel group, and return it. A cluster is rejected."""
    parts = _split_url(value, "redis://host:6379/0")
    if parts.scheme in _CLUSTERS:
        raise ValueError(
            "must be one server or a Sentinel group, because arq uses several keys in one transaction, which a cluster "
            "spreads over its nodes; it must start with redis://, rediss:// or unix://"
        )
    return _checked_server(value, parts)


def cache_url(value: str) -> str:
    """Check the URL of a Redis or Valkey server, of a Sentinel group or of a cluster, and return it."""
    parts = _split_url(value, "redis://host:6379/0")
    return _checked_server(value, parts, ", or redis+cluster:// or rediss+cluster:// for a cluster")


def _checked_server(value: str, parts: SplitResult, others: str = "") -> str:
    cluster = parts.scheme in _CLUSTERS
    if cluster and (not parts.hostname or parts.path.strip("/") not in ("", "0")):
        raise ValueError(f"must name nodes of the cluster and no database: {parts.scheme}://host1:6379,host2:6379/")
    if not cluster and parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"must start with redis://, rediss:// or unix://{others}")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("must name a socket: unix:///path/to/socket")
    if parts.scheme in ("redis", "rediss") and not (parts.hostname and re.fullmatch(r"/?[0-9]{0,4}", parts.path)):
        raise ValueError(f"must name a host, and may name a port and a database: {parts.scheme}://host:6379/0")
    allowed: tuple[str, ...] = () if cluster else ("db", "sentinel")
    if parts.scheme.startswith("rediss"):
        allowed += _TLS_OPTIONS
    for name, given in parse_qsl(parts.query, keep_blank_values=True):
        # Other options would change timeouts and encodings that the service relies on, or weaken TLS.
        if name not in allowed or not given:
            listed = ", ".join(allowed) or "none without TLS"
            raise ValueError(f"the option {name!r} is not allowed, or has no value; allowed are {listed}")
        if name == "db" and not re.fullmatch(r"[0-9]{1,4}", given):
            raise ValueError("the option 'db' must be a number")
        if name == "ssl_check_hostname" and given not in ("true", "false"):
            raise ValueError("the option 'ssl_check_hostname' must be true or false")
    return value


def model_url(value: str) -> str:
    """The base URL of a chat-completions endpoint. A trailing `/chat/completions` is removed."""
    return _base_url(value, "https://host/v1", "the key in PROFILES_MODEL_KEY").removesuffix("/chat/completions")


def traces_url(value: str) -> str:
    """The base URL of an OTLP/HTTP collector. A trailing `/v1/traces` is removed."""
    return _base_url(value, "http://host:4318", "OTEL_EXPORTER_OTLP_HEADERS").removesuffix("/v1/traces")


def _base_url(value: str, example: str, secret: str) -> str:
    parts = _split_url(value, example)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must start with http:// or https:// and name a host, such as {example}")
    if "@" in parts.netloc:
        raise ValueError(f"must not contain a user or a password; set {secret}")
    if "?" in value or "#" in value or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError(f"must be ASCII without a query or a fragment, such as {example}")
    return value.rstrip("/")


def networks(value: str) -> tuple[Network, ...]:
    """Parse comma-separated IP addresses and networks, such as `127.0.0.1,10.0.0.0/8`."""
    try:
        return tuple(ipaddress.ip_network(item) for item in _items(value))
    except ValueError as error:
        raise ValueError(f"must be addresses or networks, such as 127.0.0.1,10.0.0.0/8: {error}") from None


def api_keys(value: str) -> tuple[ApiKey, ...]:
    """Parse comma-separated `name:scope+scope:sha256hex`. Error messages show at most the name of a key."""
    keys: list[ApiKey] = []
    for number, item in enumerate(_items(value), start=1):
        parts = item.split(":")
        if len(parts) != len(_API_KEY):
            raise ValueError(f"key {number} must be name:scope+scope:sha256hex")
        for part, (pattern, rule) in zip(parts, _API_KEY, strict=True):
            if re.fullmatch(pattern, part) is None:  # The part is not shown, because it may be the key itself.
                raise ValueError(f"key {number}: {rule}")
        name, scopes, digest = parts
        if any(key.name == name for key in keys):
            raise ValueError(f"key {name}: the name is used twice; give each key its own name")
        if any(key.sha256.hex() == digest for key in keys):
            raise ValueError(f"key {name}: another name has the same key; make one with `profiles keys new`")
        keys.append(ApiKey(name, frozenset(scopes.split("+")), bytes.fromhex(digest)))
    return tuple(keys)


def _items(value: str) -> Iterator[str]:
    return filter(None, (part.strip() for part in value.split(",")))


def _assignments(value: str, parse: Callable[[str, str], float], what: str = "") -> dict[str, float]:
    """Parse comma-separated `name=text` to a number per name. `parse(name, text)` returns the number. If it raises
    `ValueError`, `what` and the name are put before its message."""
    given: dict[str, float] = {}
    for part in _items(value):
        name, _, text = part.partition("=")
        if name in given:
            raise ValueError(f"{name} is given twice")
        try:
            given[name] = parse(name, text)
        except ValueError as error:
            raise ValueError(f"{what}{name} {error}") from None
    return given


def rewards(value: str) -> tuple[tuple[str, float], ...]:
    """Parse comma-separated `outcome=reward`. `app.bandit.learning.attribution` checks the names of the outcomes."""
    return tuple(_assignments(value, lambda _, text: share(text), "the reward of ").items())


def rollout_rails(value: str) -> RolloutRails:
    """Parse comma-separated `guardrail=limit`; guardrails that are not named keep their defaults."""
    names = [item.name for item in msgspec.structs.fields(RolloutRails)]

    def limit(name: str, text: str) -> float:
        if name not in names:
            raise ValueError(f"is unknown; guardrails are {', '.join(names)}")
        return _milliseconds(text) if name == "p99_ms" else share(text)

    return RolloutRails(**_assignments(value, limit))
