"""`profiles features`: list, create, test and compare features; disable and enable them. `profiles openapi`."""

from __future__ import annotations

import json
import re
import sys
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import click
import msgspec

from app.cli.common import (
    ACTOR,
    json_option,
    out,
    plain,
    print_json,
    print_rows,
    progress,
    reason_option,
    registry_option,
    run,
    settings_of_command,
)
from app.errors import NotFound, RegistryError
from app.features.clock import SystemClock, rfc3339, spoken
from app.features.export import FORMATS, catalogue_entry, scaffold
from app.features.plan import Announced, Change, changes, definitions_of, feature_of
from app.features.registry import Registry
from app.settings import Settings

if TYPE_CHECKING:
    from app.features.contract import Contract
    from app.profiles.trial import Difference, Trial
    from app.stores.sql.database import Database

UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}


@click.group(invoke_without_command=True)
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["table", "json", "json-schema", "python", "typescript"]),
    default="table",
    help="json-schema, python and typescript export the contract for callers.",
)
@registry_option
@click.pass_context
def features(context: click.Context, fmt: str, registry: str | None) -> None:
    """List the features, or export their contract."""
    if context.invoked_subcommand is not None:
        context.default_map = {context.invoked_subcommand: {"registry": registry}}
        return
    # `--format python` prints the correct typed Struct, so it must work while the Struct in the module is wrong.
    contract = _contract(settings_of_command(), registry, own_mirror=fmt != "python")
    if fmt in FORMATS:
        click.echo(FORMATS[fmt](contract.registry, contract.mirror), nl=False)
    elif fmt == "json":
        print_json({"features": [catalogue_entry(entry) for entry in contract.registry]})
    else:
        _show_table(contract)


@click.command()
@registry_option
def openapi(registry: str | None) -> None:
    """Print the OpenAPI document of the service, for code generators. No service needs to run."""
    from app.asgi import document

    settings = settings_of_command()
    click.echo(json.dumps(document(settings, _contract(settings, registry)), indent=2, ensure_ascii=False))


def _show_table(contract: Contract) -> None:
    from rich.table import Column, Table

    texts = [Column(heading, overflow="fold") for heading in ("window", "TTL", "default", "reads", "description")]
    table = Table(*(Column(heading, no_wrap=True) for heading in ("name", "dtype")), *texts)
    for entry in contract.registry:
        table.add_row(
            entry.name,
            entry.dtype,
            spoken(entry.window),
            spoken(entry.ttl),
            json.dumps(entry.default),
            ", ".join(entry.relations),
            plain(entry.description),
        )
    out().print(table)


def _duration(_: click.Context, __: click.Parameter, text: str) -> timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([dhm])", text)
    if found is None or not int(found[1]):
        raise click.BadParameter("must be a whole number of days, hours or minutes, such as 7d, 12h or 30m")
    return int(found[1]) * UNITS[found[2]]


@features.command()
@click.argument("name")
@click.option(
    "--from",
    "relation",
    type=click.Choice(["feedback", "views"]),
    required=True,
    help="The relation that its SQL reads: feedback, or views (tips served).",
)
@click.option("--dtype", type=click.Choice(["float", "int", "str"]), required=True)
@click.option("--window", callback=_duration, required=True, help="Only events of this period count: 7d, 12h or 30m.")
@click.option("--ttl", callback=_duration, default="1h", show_default=True, help="How long a value may be cached.")
def new(name: str, relation: str, dtype: str, window: timedelta, ttl: timedelta) -> None:
    """Print a module with a new feature NAME to start from.

    It contains a registry with that feature only and, as a comment, the line to add to the typed Struct of features.
    """
    click.echo(scaffold(name, relation, dtype, window, ttl), nl=False)


@features.command()
@click.argument("names", nargs=-1)
@registry_option
@json_option
def test(names: tuple[str, ...], registry: str | None, as_json: bool) -> None:
    """Run the examples of features on an empty database.

    Without NAMES, the examples of all features run. Examples are part of a feature's definition. Exit code 1 if a value
    differs from the expected one.
    """
    from app.stores.sqlite.feature_examples import run_examples

    settings = settings_of_command()
    contract = _contract(settings, registry)
    mask = contract.registry.mask(names or None)
    found = run(run_examples(contract.registry, mask, settings.statement_timeout_ms / 1000))
    if as_json:
        print_json([item._asdict() for item in found])
    else:
        for item in found:
            count = f"{item.examples} example{'s' if item.examples > 1 else ''}" if item.examples else "no examples"
            state = f", {len(item.failures)} FAILED" if item.failures else " ok" if item.examples else ""
            click.echo(f"{item.feature}: {count}{state}")
            for failure in item.failures:
                click.echo(f"  {failure}")
    sys.exit(1 if any(item.failures for item in found) else 0)


@features.command()
@registry_option
@json_option
def plan(registry: str | None, as_json: bool) -> None:
    """Show what would change if the registry were served.

    The registry is compared with the one that processes serve or, if none is running, served last. Shown are the
    features that change, for how many users they must be recomputed (counted up to 100,000), and the cost. Nothing is
    written. Exit code 1 if serving the registry would break callers (a feature is removed or its dtype changes) or if a
    process could not start (the SQL of a feature fails for stored users).
    """
    settings = settings_of_command()
    found = run(_plan(settings, _contract(settings, registry)))
    (print_json if as_json else print_rows)(found)
    sys.exit(1 if found["breaks"] else 0)


async def _plan(settings: Settings, contract: Contract) -> dict[str, Any]:
    from app.bootstrap.engines import open_engine
    from app.profiles.trial import SAMPLE, try_features
    from app.stores.sql.users import SqlUsers

    clock, registry = SystemClock(), contract.registry
    async with open_engine(settings) as engine:
        database = engine.database
        await engine.check_features(registry)
        served = await _served(database, clock.now_ms())
        before = served[-1] if served else None
        found = changes(before.definitions if before else (), definitions_of(registry))
        recomputed = registry.known_mask(item.feature for item in found if item.recomputed)
        users = SqlUsers(database)
        source = engine.source(registry)
        trials = {
            registry.names[trial.feature]: trial
            for trial in await try_features(source, registry, recomputed, await users.newest_users(SAMPLE), clock)
        }
        shown = []
        for item in found:
            since_ms = clock.now_ms() - registry.named(item.feature).window_ms if item.recomputed else None
            count = await users.count_eligible(since_ms) if since_ms is not None else 0
            shown.append(_planned(item, trials.get(item.feature), count))
    return {
        "registry": registry.fingerprint,
        "compared_with": before.fingerprint if before else None,
        "last_seen": rfc3339(before.last_seen_ms) if before else None,
        "also_running": [item.fingerprint for item in served[:-1]],
        "changes": shown,
        "breaks": any(item["breaks"] for item in shown),
    }


def _planned(change: Change, trial: Trial | None, users: int) -> dict[str, Any]:
    error = trial.error if trial is not None else None
    us_per_user = trial.us_per_user if trial is not None else None
    return {
        "feature": change.feature,
        "change": change.kind,
        "details": [*change.details, *([f"fails: {error}"] if error else [])],
        "breaks": change.breaks or error is not None,
        "recomputed_users": users,
        "us_per_user": None if us_per_user is None else round(us_per_user, 1),
        "total_s": None if us_per_user is None else round(us_per_user * users / 1e6, 1),
    }


@features.command()
@click.argument("name")
@click.option("--users", "count", default=1_000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--seed", default=1, show_default=True, type=int, help="The same seed draws the same users.")
@registry_option
@json_option
def diff(name: str, count: int, seed: int, registry: str | None, as_json: bool) -> None:
    """Compare a feature's values under its previous and its current definition.

    Both definitions of NAME are computed for users drawn at random. Nothing is written. Exit code 5 if the feature was
    never served with another definition.
    """
    settings = settings_of_command()
    contract = _contract(settings, registry)
    contract.registry.mask([name])
    found = run(_diff(settings, contract, name, count, seed))
    (print_json if as_json else print_rows)(msgspec.to_builtins(found))


async def _diff(settings: Settings, contract: Contract, name: str, count: int, seed: int) -> Difference:
    from app.bootstrap.engines import open_engine
    from app.profiles.trial import compare
    from app.stores.sql.users import SqlUsers

    clock, entry = SystemClock(), contract.registry.named(name)
    async with open_engine(settings) as engine:
        database = engine.database
        served = await _served(database, clock.now_ms(), every=True)
        definitions = [item for known in reversed(served) for item in known.definitions if item.name == name]
        before = next((item for item in definitions if item.fingerprint != entry.fingerprint), None)
        if before is None:
            unchanged = f"{name} was never served with another definition"
            raise NotFound((unchanged if definitions else f"no process has served {name} yet") + "; nothing to compare")
        await engine.check_features(Registry([entry]))
        try:
            await engine.check_features(Registry([feature_of(before)]))
        except RegistryError as error:
            raise NotFound(f"the last definition can no longer be computed: {error}") from error
        with progress("users") as bar:
            task = bar.add_task("comparing", total=count)
            return await compare(
                feature_of(before),
                entry,
                engine.source,
                SqlUsers(database).eligible,
                count=count,
                random=Random(seed),  # noqa: S311  # a sample, no secret
                clock=clock,
                tell=lambda done: bar.update(task, completed=done),
            )


@features.command()
@click.argument("name")
@reason_option
def disable(name: str, reason: str) -> None:
    """Serve a feature as null.

    Every process serves NAME as null within a second. Cached values are kept, and served again when NAME is enabled.
    """
    run(_switch(name, reason, on=False))
    click.echo(f"{name} is disabled: it is served as null until `profiles features enable {name}`")


@features.command()
@click.argument("name")
@reason_option
def enable(name: str, reason: str) -> None:
    """Serve a disabled feature again."""
    run(_switch(name, reason, on=True))
    click.echo(f"{name} is enabled")


async def _switch(name: str, reason: str, *, on: bool) -> None:
    from app.bootstrap.engines import open_engine
    from app.operations.audit import audited
    from app.stores.sql.access import SqlAuditTrail
    from app.stores.sql.registries import SqlRegistries

    settings, now_ms = settings_of_command(), SystemClock().now_ms()
    async with open_engine(settings) as engine:
        database = engine.database
        registries = SqlRegistries(database)
        # Served registries count first, so that a feature can be switched even if this command has another registry, or
        # one that cannot be loaded.
        if not any(item.name == name for known in await registries.announced() for item in known.definitions):
            _contract(settings, None).registry.mask([name])
        action = "enable feature" if on else "disable feature"
        async with audited(SqlAuditTrail(database), now_ms, ACTOR, action, name) as act:
            act.outcome = await registries.switch(name, ACTOR, reason, now_ms, on=on)


def _contract(settings: Settings, registry: str | None, *, own_mirror: bool = True) -> Contract:
    from app.bootstrap.contract import load_contract

    return load_contract(settings, registry, own_mirror=own_mirror)


async def _served(database: Database, now_ms: int, *, every: bool = False) -> list[Announced]:
    """The registries that running processes serve, the newest last; if none runs, the one that was served last.

    With `every`, all registries that any process ever served.
    """
    from app.stores.sql.registries import SqlRegistries
    from app.stores.sql.samples import running

    known = await SqlRegistries(database).announced()
    if every:
        return known
    samples = await database.read(lambda connection: running(connection, now_ms))
    served = {sample.registry for sample in samples}
    return [item for item in known if item.fingerprint in served] or known[-1:]
