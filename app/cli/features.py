"""`profiles features` (list, create, test, compare, disable, enable) and `profiles openapi` (print the document)."""

import json
import re
from datetime import timedelta
from random import Random
from typing import Any

import click

from app.cli.common import ACTOR, as_command, contract_of_command, out, plain, progress, settings_of_command, show
from app.cli.options import json_option, reason_option, registry_option
from app.errors import NotFound, RegistryError
from app.features.clock import SystemClock, rfc3339, spoken
from app.features.export import FORMATS, catalogue_entry, scaffold
from app.features.plan import changes, definitions_of, feature_of
from app.features.registry import Registry

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
    _, contract = contract_of_command(registry, own_mirror=fmt != "python")
    if fmt in FORMATS:
        click.echo(FORMATS[fmt](contract.registry, contract.mirror), nl=False)
        return
    if fmt == "json":
        show({"features": [catalogue_entry(entry) for entry in contract.registry]}, as_json=True)
        return
    from rich.table import Column, Table

    texts = [Column(heading, overflow="fold") for heading in ("window", "TTL", "default", "reads", "description")]
    table = Table(*(Column(heading, no_wrap=True) for heading in ("name", "dtype")), *texts)
    for entry in contract.registry:
        reads, description = ", ".join(entry.relations), plain(entry.description)
        times = (spoken(entry.window), spoken(entry.ttl))
        table.add_row(entry.name, entry.dtype, *times, json.dumps(entry.default), reads, description)
    out().print(table)


@click.command()
@registry_option
def openapi(registry: str | None) -> None:
    """Print the OpenAPI document of the service, for code generators. No service needs to run."""
    from app.asgi import document

    click.echo(json.dumps(document(*contract_of_command(registry)), indent=2, ensure_ascii=False))


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
@as_command
async def test(names: tuple[str, ...], registry: str | None, as_json: bool) -> int:
    """Run the examples of features on an empty database.

    Without NAMES, the examples of all features run. Examples are part of a feature's definition. Exit code 1 if a value
    differs from the expected one.
    """
    from app.stores.sqlite.feature_examples import run_examples

    settings, contract = contract_of_command(registry)
    mask = contract.registry.mask(names or None)
    found = await run_examples(contract.registry, mask, settings.statement_timeout_ms / 1000)
    lines: list[str] = []
    for item in found:
        count = f"{item.examples} example{'s' if item.examples > 1 else ''}" if item.examples else "no examples"
        state = f", {len(item.failures)} FAILED" if item.failures else " ok" if item.examples else ""
        lines += [f"{item.feature}: {count}{state}", *(f"  {failure}" for failure in item.failures)]
    show([item._asdict() for item in found], as_json, *lines)
    return 1 if any(item.failures for item in found) else 0


@features.command()
@registry_option
@json_option
@as_command
async def plan(registry: str | None, as_json: bool) -> int:
    """Show what would change if the registry were served.

    The registry is compared with the one that processes serve or, if none is running, served last. Shown are the
    features that change, for how many users they must be recomputed (counted up to 100,000), and how long that takes.
    Nothing is written. Exit code 1 if serving the registry would break callers (a feature is removed or its dtype
    changes) or if a process could not start (the SQL of a feature fails for stored users).
    """
    from app.bootstrap.engines import open_engine
    from app.profiles.trial import SAMPLE, Trial, try_features
    from app.stores.sql.registries import SqlRegistries
    from app.stores.sql.samples import running
    from app.stores.sql.users import SqlUsers

    settings, contract = contract_of_command(registry)
    clock, new = SystemClock(), contract.registry
    shown: list[dict[str, Any]] = []
    async with open_engine(settings) as engine:
        users = SqlUsers(engine.database)
        await engine.check_features(new)
        known = await SqlRegistries(engine.database).announced()
        samples = await engine.database.read(lambda connection: running(connection, clock.now_ms()))
        fingerprints = {sample.registry for sample in samples}
        served = [item for item in known if item.fingerprint in fingerprints] or known[-1:]  # the newest last
        before = served[-1] if served else None
        found = changes(before.definitions if before else (), definitions_of(new))
        recomputed = new.known_mask(item.feature for item in found if item.recomputed)
        tried = await try_features(engine.source(new), new, recomputed, await users.newest_users(SAMPLE), clock)
        trials = {new.names[trial.feature]: trial for trial in tried}
        for item in found:
            since_ms = clock.now_ms() - new.named(item.feature).window_ms if item.recomputed else None
            count = await users.count_eligible(since_ms) if since_ms is not None else 0
            trial = trials.get(item.feature, Trial(0, None))
            us_per_user = trial.us_per_user
            shown.append(
                {
                    "feature": item.feature,
                    "change": item.kind,
                    "details": [*item.details, *([f"fails: {trial.error}"] if trial.error else [])],
                    "breaks": item.breaks or trial.error is not None,
                    "recomputed_users": count,
                    "us_per_user": None if us_per_user is None else round(us_per_user, 1),
                    "total_s": None if us_per_user is None else round(us_per_user * count / 1e6, 1),
                }
            )
    breaks = any(item["breaks"] for item in shown)
    result = {
        "registry": new.fingerprint,
        "compared_with": before.fingerprint if before else None,
        "last_seen": rfc3339(before.last_seen_ms) if before else None,
        "also_running": [item.fingerprint for item in served[:-1]],
        "changes": shown,
        "breaks": breaks,
    }
    show(result, as_json)
    return 1 if breaks else 0


@features.command()
@click.argument("name")
@click.option("--users", "count", default=1_000, show_default=True, type=click.IntRange(1, 1_000_000))
@click.option("--seed", default=1, show_default=True, type=int, help="The same seed draws the same users.")
@registry_option
@json_option
@as_command
async def diff(name: str, count: int, seed: int, registry: str | None, as_json: bool) -> None:
    """Compare a feature's values under its previous and its current definition.

    Both definitions of NAME are computed for users drawn at random. Nothing is written. Exit code 5 if the feature was
    never served with another definition.
    """
    from app.bootstrap.engines import open_engine
    from app.profiles.trial import compare
    from app.stores.sql.registries import SqlRegistries
    from app.stores.sql.users import SqlUsers

    settings, contract = contract_of_command(registry)
    contract.registry.mask([name])
    entry = contract.registry.named(name)
    async with open_engine(settings) as engine:
        known = reversed(await SqlRegistries(engine.database).announced())
        definitions = [item for served in known for item in served.definitions if item.name == name]
        before = next((item for item in definitions if item.fingerprint != entry.fingerprint), None)
        if before is None:
            unchanged = f"{name} was never served with another definition"
            raise NotFound((unchanged if definitions else f"no process has served {name} yet") + "; nothing to compare")
        await engine.check_features(Registry([entry]))
        try:
            await engine.check_features(Registry([feature_of(before)]))
        except RegistryError as error:
            raise NotFound(f"the last definition can no longer be computed: {error}") from error
        with progress("comparing", "users", count) as update:
            found = await compare(
                feature_of(before),
                entry,
                engine.source,
                SqlUsers(engine.database).eligible,
                count=count,
                random=Random(seed),  # noqa: S311  # a sample, no secret
                clock=SystemClock(),
                tell=lambda done: update(completed=done),
            )
    show(found, as_json)


def _add_switch(text: str, done: str, *, on: bool) -> None:
    @features.command("enable" if on else "disable", help=text)
    @click.argument("name")
    @reason_option
    @as_command
    async def command(name: str, reason: str) -> None:
        from app.bootstrap.engines import open_engine
        from app.operations.audit import audited
        from app.stores.sql.access import SqlAuditTrail
        from app.stores.sql.registries import SqlRegistries

        now_ms, action = SystemClock().now_ms(), "enable feature" if on else "disable feature"
        async with open_engine(settings_of_command()) as engine:
            registries = SqlRegistries(engine.database)
            # Served registries count first, so that a feature can be switched even if this command has another
            # registry, or one that cannot be loaded.
            if not any(item.name == name for known in await registries.announced() for item in known.definitions):
                contract_of_command()[1].registry.mask([name])
            async with audited(SqlAuditTrail(engine.database), now_ms, ACTOR, action, name) as act:
                act.outcome = await registries.switch(name, ACTOR, reason, now_ms, on=on)
        click.echo(done.format(name=name))


_add_switch(
    "Serve a feature as null.\n\nEvery process serves NAME as null within a second. Cached values are kept, and served "
    "again when NAME is enabled.",
    "{name} is disabled: it is served as null until `profiles features enable {name}`",
    on=False,
)
_add_switch("Serve a disabled feature again.", "{name} is enabled", on=True)
