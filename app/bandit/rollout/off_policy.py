"""Off-policy estimates: what a policy would have earned, from decisions that another policy made.

Each function takes one-dimensional arrays with one row a decision, and returns a float: `rewards`, what was earned;
`pi_e`, the probability of the chosen candidate under the policy in question; `pi_b`, its probability under the policy
that chose it, as logged. w = pi_e / pi_b is a decision's weight. Intervals are in `intervals`.

Pure arithmetic: nothing here knows where decisions are kept. Every function raises `ValueError`, which names the
argument, where an array is empty, has another length or more than one dimension, or holds what is not finite; where a
probability is negative; where `pi_b` is not above 0, for what cannot be chosen is not logged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def ips(rewards: npt.ArrayLike, pi_e: npt.ArrayLike, pi_b: npt.ArrayLike) -> float:
    """Inverse propensity scoring: 1/n sum of w r.

    Unbiased where `pi_b` is right and above 0 wherever `pi_e` is; in the unit of the rewards, but not within their
    range. D. G. Horvitz, D. J. Thompson: A generalization of sampling without replacement, JASA 47, 1952.
    """
    r, e, b = _columns(rewards=rewards, pi_e=pi_e, pi_b=pi_b)
    return float(np.mean(_weights(e, b) * r))


def snips(rewards: npt.ArrayLike, pi_e: npt.ArrayLike, pi_b: npt.ArrayLike) -> float:
    """Self-normalised inverse propensity scoring: sum of w r / sum of w.

    A mean of the rewards, weighted: never outside their range, and it moves with them when they are shifted. Its bias
    goes to 0 with n. A. Swaminathan, T. Joachims: The self-normalized estimator for counterfactual learning, NIPS 2015.

    Raises:
        ValueError: also where every weight is 0: none of these decisions says anything of the policy.
    """
    r, e, b = _columns(rewards=rewards, pi_e=pi_e, pi_b=pi_b)
    weights = _weights(e, b)
    largest = weights.max()
    if largest == 0:
        raise ValueError("every weight is 0: pi_e gives none of the logged choices a chance")
    shares = weights / largest  # as a ratio it is the same, and no sum under- or overflows
    return float(np.sum(shares * r) / np.sum(shares))


def ess(weights: npt.ArrayLike) -> float:
    """Effective sample size, in decisions: (sum of w)² / sum of w².

    So many decisions of equal weight would say as much: n where all weights are equal, 0 where all are 0.
    L. Kish: Survey Sampling, 1965.
    """
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
    """Doubly robust: 1/n sum of v_e + w (r - q_logged).

    `q_logged` is what a model expects of the candidate that was chosen, `v_e` what it expects of the policy: the sum of
    pi_e(a) q(a) over all candidates of that decision. Unbiased where `pi_b` is right, whatever the model says, if the
    model was fitted on other decisions; the better the model, the smaller the variance.
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
    """How much more often the policy in question makes each choice."""
    if np.any(pi_e < 0):
        raise ValueError(f"pi_e must not be negative, the least is {pi_e.min()}")
    if np.any(pi_b <= 0):
        raise ValueError(f"pi_b must be above 0, the least is {pi_b.min()}")
    with np.errstate(over="ignore", under="ignore"):
        weights = pi_e / pi_b
    bad = np.flatnonzero(~np.isfinite(weights))
    if len(bad):
        raise ValueError(f"pi_b[{bad[0]}] is {pi_b[bad[0]]}: too small beside pi_e, the weight overflows")
    return weights
