"""The setting `database`: the path of a SQLite file, or the URL of a PostgreSQL database."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from app.settings.parsers import path

# Of the session that serves, libpq understands more values: `any` would read from a standby, which may lag behind.
_ALLOWED = {
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


def database(value: str) -> Path | PostgresUrl:
    if value.startswith(("postgresql://", "postgres://")):
        return postgres_url(value)
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", value):
        raise ValueError("must be the path of a SQLite file or postgresql://…; no other database is supported")
    return path(value)


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
    for name, allowed in _ALLOWED.items():
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
