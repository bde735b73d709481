"""Off-policy estimators: the value of a policy, from decisions that another policy made.

All arguments are one-dimensional with one element per decision, shape (n,); results are floats. `rewards` r are the
rewards received, `pi_e` the probabilities of the chosen candidates under the evaluated policy, and `pi_b` their logged
propensities under the policy that chose them. w = pi_e / pi_b is the importance weight of a decision.
`bootstrap_intervals` computes intervals.

Every function raises `ValueError`, naming the argument, if an array is empty, has another length or more than one
dimension, or contains NaN or infinity; if a probability is negative; or if `pi_b` is 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from app.bandit.numpy_on_demand import np

if TYPE_CHECKING:
    import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.float64]"


def ips(rewards: npt.ArrayLike, pi_e: npt.ArrayLike, pi_b: npt.ArrayLike) -> float:
    """Inverse propensity scoring: (1/n) Σ w r with w = pi_e / pi_b and the rewards r, in units of the reward.

    Unbiased if `pi_b` is correct and positive wherever `pi_e` is. May lie outside the range of the rewards.
    D. G. Horvitz, D. J. Thompson: A generalization of sampling without replacement, JASA 47, 1952.
    """
    r, e, b = _columns(rewards=rewards, pi_e=pi_e, pi_b=pi_b)
    return float(np.mean(_weights(e, b) * r))


def snips(rewards: npt.ArrayLike, pi_e: npt.ArrayLike, pi_b: npt.ArrayLike) -> float:
    """Self-normalised inverse propensity scoring: Σ w r / Σ w with w = pi_e / pi_b, in units of the reward.

    Always within the range of the rewards. Biased; the bias vanishes as n grows.
    A. Swaminathan, T. Joachims: The self-normalized estimator for counterfactual learning, NIPS 2015.

    Raises:
        ValueError: every weight is 0, or an argument is invalid (see the docstring of the module).
    """
    r, e, b = _columns(rewards=rewards, pi_e=pi_e, pi_b=pi_b)
    weights = _weights(e, b)
    largest = weights.max()
    if largest == 0:
        raise ValueError("every weight is 0: pi_e gives none of the logged choices a chance")
    shares = weights / largest  # the ratio is the same, and no sum under- or overflows
    return float(np.sum(shares * r) / np.sum(shares))


def ess(weights: npt.ArrayLike) -> float:
    """The effective sample size (Σ w)² / Σ w² of n importance weights: n if all are equal, 0 if all are 0. L. Kish:
    Survey Sampling, 1965."""
    (w,) = _columns(weights=weights)
    if np.any(w < 0):
        raise ValueError(f"weights must not be negative, the least is {w.min()}")
    largest = w.max()
    if largest == 0:
        return 0.0
    shares = w / largest
    return float(np.sum(shares) ** 2 / np.sum(shares**2))


def dr(
    rewards: npt.ArrayLike, pi_e: npt.ArrayLike, pi_b: npt.ArrayLike, q_logged: npt.ArrayLike, v_e: npt.ArrayLike
) -> float:
    """The doubly robust estimate: (1/n) Σ (v_e + w (r - q_logged)) with w = pi_e / pi_b, in units of the reward.

    With q(a) the reward that a model predicts for candidate a, `q_logged` is q(chosen) and `v_e` is Σₐ pi_e(a) q(a).
    If `pi_b` is correct and the model was fitted to other decisions, the estimate is unbiased whatever the model
    predicts. The better the model, the smaller the variance.
    M. Dudík, J. Langford, L. Li: Doubly robust policy evaluation and learning, ICML 2011.
    """
    r, e, b, q, v = _columns(rewards=rewards, pi_e=pi_e, pi_b=pi_b, q_logged=q_logged, v_e=v_e)
    return float(np.mean(v + _weights(e, b) * (r - q)))


def _columns(**given: npt.ArrayLike) -> list[Floats]:
    columns = {name: _column(name, values) for name, values in given.items()}
    (first, rows), *others = ((name, len(column)) for name, column in columns.items())
    for name, length in others:
        if length != rows:
            raise ValueError(f"{name} has {length} rows, {first} has {rows}: one row a decision")
    return list(columns.values())


def _column(name: str, values: npt.ArrayLike) -> Floats:
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers: {error}") from error
    if column.ndim != 1:
        raise ValueError(f"{name} must have one dimension, has {column.ndim}")
    if not len(column):
        raise ValueError(f"{name} is empty: there is nothing to estimate from")
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        raise ValueError(f"{name}[{bad[0]}] is {column[bad[0]]}: every value must be finite")
    return column


def _weights(pi_e: Floats, pi_b: Floats) -> Floats:
    """The importance weights w = pi_e / pi_b (n,)."""
    if np.any(pi_e < 0):
        raise ValueError(f"pi_e must not be negative, the least is {pi_e.min()}")
    if np.any(pi_b <= 0):
        raise ValueError(f"pi_b must be above 0, the least is {pi_b.min()}")
    with np.errstate(over="ignore", under="ignore"):
        weights = pi_e / pi_b
    bad = np.flatnonzero(~np.isfinite(weights))
    if len(bad):
        raise ValueError(f"pi_b[{bad[0]}] is {pi_b[bad[0]]}: too small compared with pi_e, the weight overflows")
    return weights
