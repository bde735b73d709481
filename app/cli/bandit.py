"""Commands about the bandit: `profiles rollout`, `profiles decisions` and `profiles evaluate`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, get_type_hints

import click
import msgspec

from app.cli.common import ACTOR, plain, progress, say, show, with_service
from app.cli.options import json_option, reason_option, time_option
from app.errors import InvalidInput, Issue, RegistryError

if TYPE_CHECKING:
    from app.bandit.evaluation import Evaluation
    from app.bandit.model.thompson_sampling import Policy
    from app.bandit.ports import UserLog
    from app.bandit.rollout.stages import Move
    from app.bandit.rollout.status import RolloutStatus
    from app.bootstrap.service import OpenService
    from app.features.registry import Registry
    from app.stores.training_set.columns import Kind

EXPORTED_AT_ONCE = 500
USERS_AT_ONCE = 1_000


@click.group()
def rollout() -> None:
    """Show and change the stage of the challenger.

    Run it with the settings of the service, which contain the guardrails and turn the challenger on or off.
    """


@rollout.command()
@json_option
@with_service
async def status(service: OpenService, as_json: bool) -> None:
    """Show the stage, the verdict and the figures of the newest look (interim analysis)."""
    _show_rollout(await service.bandit.rollout.status(), as_json)


def _add_command(move: Move, text: str) -> None:
    @rollout.command(move, help=text)
    @reason_option
    @json_option
    @with_service
    async def command(service: OpenService, reason: str, as_json: bool) -> None:
        await service.bandit.rollout.move(move, ACTOR, reason)
        _show_rollout(await service.bandit.rollout.status(), as_json)


_add_command("ramp", "Go one step up: 5 %, 25 %, 100 % of the users. After a rollback: back to the shadow stage.")
_add_command("promote", "Let the challenger serve for good. It must serve all users already and be shown to be better.")
_add_command("rollback", "Let the champion serve all users again. Possible at any stage.")


def _show_rollout(found: RolloutStatus, as_json: bool) -> None:
    shown = msgspec.to_builtins(found)
    if not as_json:
        del shown["looks"]  # `figures` are those of the newest
    show(shown, as_json)


@click.group()
def decisions() -> None:
    """Export the decision log."""


@decisions.command()
@time_option("--since", "since_ms", help="Only decisions made at or after this time. Default: all.")
@time_option("--until", "until_ms", help="Only decisions made before this time. Default: now.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="*.parquet, *.ndjson or *.csv; `-` is NDJSON on standard output.",
)
@with_service
async def export(service: OpenService, since_ms: int | None, until_ms: int | None, output: Path) -> None:
    """Write each decision with its inputs and its outcome, oldest first.

    A record has the candidates, their input vectors phi, the scores and propensities of both policies, the chosen
    candidate, the context, the profile with the version of each value, and the version of the pooled prior. It also has
    the decision's state and reward. GET /decisions returns the same records. Times have a UTC offset, as in
    2026-04-25T08:30:00+02:00.
    """
    from app.bandit.ports import EARLIEST_MS, DecisionMoment
    from app.stores.training_set.columns import JsonColumn
    from app.stores.training_set.output import NdjsonWriter, writer_for

    after: DecisionMoment | None = DecisionMoment(EARLIEST_MS if since_ms is None else since_ms)
    end_ms = service.clock.now_ms() if until_ms is None else until_ms
    path, written = None if str(output) == "-" else output, 0
    encode, kinds = msgspec.json.Encoder().encode, _kinds()
    if since_ms is not None and since_ms > end_ms:
        raise InvalidInput("the period is invalid", [Issue("--since", "must not be later than --until (default: now)")])
    with writer_for(path, NdjsonWriter) as writer, progress("exporting", "decisions", shown=path is not None) as update:
        while after is not None:
            records, after = await service.bandit.decisions.page(after, end_ms, EXPORTED_AT_ONCE)
            writer.write(  # even if there are no records, because a file needs its columns to be valid Parquet
                {
                    name: JsonColumn([encode(getattr(record, name)) for record in records], kind)
                    for name, kind in kinds.items()
                }
            )
            written += len(records)
            update(completed=written)
    if path is not None:
        say(f"{written} decisions written to {path}")


def _kinds() -> dict[str, Kind]:
    """The kind of each column of the export, by name. It follows from the type of the field of `DecisionRecord`. A type
    that is not listed here becomes text, and nested values become JSON."""
    from app.bandit.decisions import DecisionRecord, Time

    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", Time: "time"}
    kinds |= {list[float]: "vector", list[list[float]]: "matrix"}
    kinds |= {kind | None: name for kind, name in kinds.items()}
    return {name: kinds.get(kind, "text") for name, kind in get_type_hints(DecisionRecord).items()}


def _scale(_: click.Context, __: click.Parameter, scale: float | None) -> float | None:
    from app.bandit.evaluation import MAX_V

    if scale is not None and not 0 < scale <= MAX_V:  # not `FloatRange`, which takes NaN
        raise click.BadParameter(f"must be greater than 0 and at most {MAX_V:,}")
    return scale


@click.command()
@click.option("--policy", required=True, metavar="NAME|FILE.toml", help="A policy, such as lints-v1, or a file.")
@click.option("--without-profile", is_flag=True, help="Evaluate the policy as if no user had a profile.")
@click.option("--v", "scale", type=float, callback=_scale, help="Another v, up to 1,000: how far the policy explores.")
@click.option(
    "--with-feature",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.py",
    help="Also give the policy the feature of REGISTRY in FILE, and estimate its lift.",
)
@time_option("--since", "since_ms", help="Evaluate only decisions made at or after this time.")
@click.option("--picture", "file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures: *.svg.")
@json_option
@with_service
async def evaluate(
    service: OpenService,
    policy: str,
    without_profile: bool,
    scale: float | None,
    with_feature: Path | None,
    since_ms: int | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Estimate the reward per decision of a policy that may never have run.

    Each decision of the log is made again with what was known at that time. The estimates are IPS, SNIPS and doubly
    robust, with 95 % intervals over users. They are the effect on the next decision: what the policy would have learned
    from its own choices is not part of it.
    """
    from app.bandit import evaluation as evaluations
    from app.stores.training_set.output import new_file

    policies = [evaluations.policy_of(policy)]
    if scale is not None:
        policies = [msgspec.structs.replace(policies[0], scale=scale)]
    registry = None if with_feature is None else _registry_of(with_feature)
    if registry is not None:
        policies.insert(0, evaluations.with_feature(policies[0], registry[0].name))
    with new_file(file) if file is not None else nullcontext() as picture:
        evaluation = await _evaluation(service, policies, not without_profile, registry, since_ms)
        found, bins = evaluation.estimates(), evaluation.calibration()
        intervals = {"IPS": found.ips, "SNIPS": found.snips, "doubly robust": found.dr}
        intervals["served" if registry is None else "without it"] = found.champion
        if picture is not None:
            picture.write(evaluations.picture(policies[0].id, intervals, bins).encode())
    shown = {"ips": found.ips, "snips": found.snips, "dr": found.dr}
    if registry is not None:
        shown["lift"] = found.lift
    name, size = plain(policies[0].id), f"effective sample size {found.ess:,.0f}"
    show(
        {"decisions": found.n, "ess": found.ess, **{name: item._asdict() for name, item in shown.items()}},
        as_json,
        f"{name}: {found.n:,} decisions of {found.users:,} users, {size}",
        *(
            f"  {label:14}{item.value:+8.4f} ({item.low:+.4f} to {item.high:+.4f})"
            for label, item in {**intervals, "difference": found.lift}.items()
        ),
        f"  mean weight   {found.mean_weight:8.4f} ± {found.mean_weight_error:.4f}; expected 1",
        "  calibration: mean reward by score of the chosen candidate",
        *(f"  {score:14.3f}{reward:8.3f}  {n:,.0f} decisions" for n, score, reward in bins),
    )


def _registry_of(file: Path) -> Registry:
    """The registry in the file. Raises `InvalidInput` unless it has exactly one feature, with a numeric dtype."""
    from app.features.contract import import_registry

    registry, _ = import_registry(f"{file}:REGISTRY", "--with-feature")
    if len(registry) != 1 or registry[0].dtype == "str":
        issue = Issue(f"{file}, REGISTRY", "must have one feature, a number")
        raise InvalidInput("one feature can be evaluated", [issue])
    return registry


async def _evaluation(
    service: OpenService, policies: Sequence[Policy], profiles: bool, registry: Registry | None, since_ms: int | None
) -> Evaluation:
    """Evaluate the first policy. If there are two policies, the second is the baseline. If `profiles` is false, no
    decision is replayed with a profile. `registry`, if given, has a feature that only the first policy uses."""
    from app.bandit.evaluation import Evaluation, PriorsFromLog, Replay, damaged

    stored = await service.bandit.decisions.priors()
    # Decisions from before the roll-out began count, too, so the oldest unsettled one of all holds back newer ones.
    state = (await service.bandit.rollout.repository.state())._replace(evaluated_after=0)
    until = (await service.bandit.rollout.counts(state)).until
    values = {} if registry is None else await feature_values(service, registry)
    replays = [Replay(policies[0], profiles, values), *(Replay(policy, profiles) for policy in policies[1:])]
    ready = [own for replay in replays if (own := replay.recorded(stored)) is not None]
    if len(ready) < len(replays):  # pool for all policies, so that the lift does not come from different pooling
        pools = [PriorsFromLog(replay, stored) for replay in replays]
        async for log in _logs(service, "pooling"):
            for pool in pools:
                pool.add(log)
        ready = [pool.pooled() for pool in pools]
    found = Evaluation(
        ready,
        stored,
        lambda item: (
            item.outcome.state == "learned"
            and item.decision.explore
            and item.number < until
            and (since_ms is None or item.decision.created_at_ms >= since_ms)
            and (registry is None or item.number in values)
        ),
    )
    unreadable = 0
    async for log in _logs(service, "evaluating"):
        found.add(log)
        unreadable += len(log.decisions) if damaged(log) else 0
    if unreadable:
        text = f"{unreadable} decisions are left out, because the statistics of their users are missing or damaged"
        say(text, level="warning", before="warning: ")
    return found


async def _logs(service: OpenService, action: str) -> AsyncIterator[UserLog]:
    after = ""
    with progress(action, "decisions") as update:
        while logs := await service.bandit.decisions.user_logs(after, USERS_AT_ONCE):
            for log in logs:
                yield log
                update(advance=len(log.decisions))
            after = logs[-1].user_id


async def feature_values(service: OpenService, registry: Registry) -> dict[int, float]:
    """Compute the registry's one feature as of each decision. The result maps the number of a decision to the rank of
    the feature's value among all values, from -1 to 1 (`evaluation.ranked`); a null value has 0. Decisions whose events
    have been pruned are left out."""
    from app.bandit.evaluation import ranked
    from app.bootstrap.engines import open_engine
    from app.profiles.online.compute import Computation
    from app.profiles.ports import ComputeRow

    moments = msgspec.structs.replace(await service.moments(), registry=registry)
    values: dict[int, float | None] = {}
    async with open_engine(service.settings) as engine:
        await engine.check_features(registry)
        source, no_secret = engine.source(registry), Random()  # noqa: S311
        computation = Computation(source, registry, service.clock, service.metrics, 1, no_secret)
        async for log in _logs(service, "computing the feature"):
            rows: dict[int, ComputeRow] = {}
            for item in log.decisions:
                read = item.decision.profile_read
                if read is not None and read.version:
                    row = ComputeRow(log.user_id, 1, read.at_ms, version=read.version)
                else:  # leave out the events of the decision's own millisecond: one may be its feedback
                    before_ms = item.decision.created_at_ms - 1
                    row = ComputeRow(log.user_id, 1, before_ms, known_ms=before_ms)
                if moments.problem(row.now_ms or 0, 1) is None:
                    rows[item.number] = row
            for number, profile in zip(rows, await computation.moments([*rows.values()]), strict=True):
                if profile[0].error is not None:
                    raise RegistryError(registry[0].name, profile[0].error)
                values[number] = msgspec.json.decode(profile[0].json, type=float | None)
    known = {number: value for number, value in values.items() if value is not None}
    return dict.fromkeys(values, 0.0) | ranked(known)
