"""`profiles evaluate`: estimate from the decision log what a policy would have earned."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from app.cli.common import json_option, moment_ms, plain, print_json, progress, say, with_service
from app.errors import InvalidInput, Issue, RegistryError

if TYPE_CHECKING:
    from app.bandit.evaluation.evaluation import Evaluation
    from app.bandit.evaluation.replay import Replay
    from app.bandit.ports import UserLog
    from app.bandit.rollout.aggregates import Estimates
    from app.bandit.rollout.bootstrap_intervals import Interval
    from app.bootstrap.service import OpenService
    from app.features.registry import Registry

PAGE = 1_000


def _scale(_: click.Context, __: click.Parameter, scale: float | None) -> float | None:
    from app.bandit.evaluation.evaluation import MAX_V

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
@click.option("--since", metavar="TIME", help="Evaluate only decisions made at or after this time.")
@click.option("--picture", "file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures: *.svg.")
@json_option
@with_service
async def evaluate(
    service: OpenService,
    policy: str,
    without_profile: bool,
    scale: float | None,
    with_feature: Path | None,
    since: str | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Estimate the reward per decision of a policy that may never have run.

    Each decision of the log is made again with what was known at that time. The estimates are IPS, SNIPS and doubly
    robust, with 95 % intervals over users. They are the effect on the next decision: what the policy would have learned
    from its own choices is not part of it.
    """
    from app.bandit.evaluation import evaluation as evaluations
    from app.bandit.evaluation.replay import Replay
    from app.stores.training_set.output import new_file

    chosen = evaluations.policy_of(policy)
    if scale is not None:
        chosen = msgspec.structs.replace(chosen, scale=scale)
    since_ms = None if since is None else moment_ms(since, "--since")
    replays = [Replay(chosen, not without_profile)]
    registry = None if with_feature is None else _registry_of(with_feature)
    if registry is not None:
        replays.insert(0, Replay(evaluations.with_feature(chosen, registry[0].name), not without_profile))
    with new_file(file) if file is not None else nullcontext() as picture:
        found = await _evaluation(service, replays, registry, since_ms)
        estimates, bins = found.estimates(), found.calibration()
        intervals = {"IPS": estimates.ips, "SNIPS": estimates.snips, "doubly robust": estimates.dr}
        intervals["served" if registry is None else "without it"] = estimates.champion
        if picture is not None:
            picture.write(evaluations.picture(replays[0].policy.id, intervals, bins).encode())
    if as_json:
        print_json(_json(estimates, lift=registry is not None))
    else:
        _show(replays[0].policy.id, estimates, intervals, bins)


async def _evaluation(
    service: OpenService, replays: list[Replay], registry: Registry | None, since_ms: int | None
) -> Evaluation:
    """Evaluate the first of the policies against the second one, if there is one. `registry` has the feature that the
    first one has in addition."""
    from app.bandit.evaluation.evaluation import Evaluation
    from app.bandit.evaluation.replay import PriorsFromLog, damaged, recorded, recorded_model

    stored = await service.bandit.decisions.priors()
    rollout = service.bandit.rollout
    # Decisions from before the roll-out began count, too, so the oldest unsettled one of all holds back newer ones.
    until = (await rollout.counts((await rollout.repository.state())._replace(evaluated_after=0))).until
    values = None if registry is None else await feature_values(service, registry)
    if values is not None:
        replays = [msgspec.structs.replace(replays[0], values=values), *replays[1:]]
    priors = [prior for replay in replays if (prior := recorded(replay, stored)) is not None]
    if len(priors) < len(replays):  # all are pooled, so that a lift does not depend on how
        pools = [PriorsFromLog(replay, stored) for replay in replays]
        async for log in _logs(service, "pooling"):
            for pool in pools:
                pool.add(log)
        priors = [pool.pooled() for pool in pools]
    found = Evaluation(
        (replays[0], priors[0]),
        (replays[1], priors[1]) if len(replays) > 1 else None,
        recorded_model(stored),
        lambda item: (
            item.outcome.state == "learned"
            and item.decision.explore
            and item.number < until
            and (since_ms is None or item.decision.created_at_ms >= since_ms)
            and (values is None or item.number in values)
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
    """Yield each user's log, with a progress bar."""
    after, done = "", 0
    with progress("decisions") as bar:
        task = bar.add_task(action, total=None)
        while logs := await service.bandit.decisions.user_logs(after, PAGE):
            for log in logs:
                yield log
                done += len(log.decisions)
                bar.update(task, completed=done)
            after = logs[-1].user_id


def _registry_of(file: Path) -> Registry:
    """The registry in the file. Raises `InvalidInput` unless it has one feature, which is a number."""
    from app.features.contract import import_registry

    registry, _ = import_registry(f"{file}:REGISTRY", "--with-feature")
    if len(registry) != 1 or registry[0].dtype == "str":
        raise InvalidInput(
            "one feature can be evaluated", [Issue(f"{file}, REGISTRY", "must have one feature, a number")]
        )
    return registry


async def feature_values(service: OpenService, registry: Registry) -> dict[int, float]:
    """By the number of each decision, the value of the registry's one feature as of the decision, ranked
    (`evaluation.ranked`); 0 for null. Decisions whose events have been pruned are left out."""
    from app.bandit.evaluation.evaluation import ranked
    from app.bootstrap.engines import open_engine
    from app.profiles.ports import ComputeRow

    moments = msgspec.structs.replace(await service.moments(), registry=registry)
    values: dict[int, float | None] = {}
    async with open_engine(service.settings) as engine:
        await engine.check_features(registry)
        source = engine.source(registry)
        async for log in _logs(service, "computing the feature"):
            asked: dict[int, ComputeRow] = {}
            for item in log.decisions:
                read = item.decision.profile_read
                if read is not None and read.version:
                    row = ComputeRow(log.user_id, 1, read.at_ms, version=read.version)
                else:  # without the events of that millisecond, of which one may be the feedback
                    before_ms = item.decision.created_at_ms - 1
                    row = ComputeRow(log.user_id, 1, before_ms, known_ms=before_ms)
                if moments.problem(row.now_ms or 0, 1) is None:
                    asked[item.number] = row
            numbers, rows = [*asked], [*asked.values()]
            while rows:
                fitting = await source.fitting(rows)
                snapshot = await source.compute(service.clock.now_ms(), rows[:fitting])
                for error in snapshot.errors.values():
                    raise RegistryError(registry[0].name, error)
                for number, raw in zip(numbers, snapshot.rows, strict=False):
                    value, wrong = registry[0].value_of(raw[0])
                    if wrong is not None:
                        raise RegistryError(registry[0].name, wrong)
                    values[number] = None if value is None else float(value)
                numbers, rows = numbers[fitting:], rows[fitting:]
    known = {number: value for number, value in values.items() if value is not None}
    return dict.fromkeys(values, 0.0) | ranked(known)


def _json(found: Estimates, *, lift: bool) -> dict[str, Any]:
    shown = {"ips": found.ips, "snips": found.snips, "dr": found.dr} | ({"lift": found.lift} if lift else {})
    return {"decisions": found.n, "ess": found.ess, **{name: item._asdict() for name, item in shown.items()}}


def _show(name: str, found: Estimates, intervals: Mapping[str, Interval], bins: Sequence[Sequence[float]]) -> None:
    click.echo(f"{plain(name)}: {found.n:,} decisions of {found.users:,} users, effective sample size {found.ess:,.0f}")
    for label, item in {**intervals, "difference": found.lift}.items():
        click.echo(f"  {label:14}{item.value:+8.4f} ({item.low:+.4f} to {item.high:+.4f})")
    click.echo(f"  mean weight   {found.mean_weight:8.4f} ± {found.mean_weight_error:.4f}; expected 1")
    click.echo("  calibration: mean reward by score of the chosen candidate")
    for n, score, reward in bins:
        click.echo(f"  {score:14.3f}{reward:8.3f}  {n:,.0f} decisions")
