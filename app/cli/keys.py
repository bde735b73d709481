"""`profiles keys`: create API keys."""

from __future__ import annotations

import re
import secrets

import click

from app.cli.common import json_option, print_json
from app.settings import hash_key
from app.settings.parsers import SCOPES


@click.group()
def keys() -> None:
    """Create API keys. The service stores only their hashes."""


@keys.command("new")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(SCOPES), default=("read",), help="May be repeated.")
@json_option
def new(name: str, scopes: tuple[str, ...], as_json: bool) -> None:
    """Create a key for NAME and print it with its entry for PROFILES_API_KEYS."""
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", name):
        raise click.BadParameter("must be 1 to 64 of A-Z a-z 0-9 _ . -", param_hint="NAME")
    key = "pk_" + secrets.token_urlsafe(32)
    entry = f"{name}:{'+'.join(dict.fromkeys(scopes))}:{hash_key(key).hex()}"
    if as_json:
        print_json({"name": name, "key": key, "entry": entry})
        return
    click.echo(f"key (not shown again):  {key}")
    click.echo(f"PROFILES_API_KEYS:      {entry}")
    click.echo("Join several entries with commas. Callers send the key in the header X-API-Key.")
