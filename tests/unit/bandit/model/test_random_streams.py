"""Random numbers derived from a decision's id: the same in every process, with one stream per use."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.bandit.model import thompson_sampling as streams
from app.bandit.model.inputs import Array


def normals(decision_id: str, stream: str, count: int = 8) -> Array:
    place = np.empty(count)
    streams.fill_normal(place, decision_id, stream)
    return place


def test_numbers_of_a_decision_are_the_same_in_every_process() -> None:
    # If these numbers change, stored decisions can no longer be recomputed.
    np.testing.assert_allclose(
        normals("d-1", streams.OLD, 3), [-0.2539319517033108, 0.44202971825993187, 1.0515161282416556], rtol=1e-12
    )
    assert streams.uniform("d-1", streams.ACTION) == 0.8922427633918991


@given(st.text(max_size=10), st.text(max_size=10))
def test_streams_differ_when_the_decision_or_the_use_differs(one: str, other: str) -> None:
    drawn = [normals(one, stream) for stream in (streams.OLD, streams.NEW, streams.ACTION)]
    if one != other:
        drawn.append(normals(other, streams.OLD))
    assert len({numbers.tobytes() for numbers in drawn}) == len(drawn)
    assert normals(one, streams.OLD).tobytes() == drawn[0].tobytes()
    assert 0 <= streams.uniform(one, streams.ACTION) < 1


def test_numbers_are_independent_normals_and_uniforms() -> None:
    drawn = np.array([normals(f"d-{n}", stream, 2) for n in range(4000) for stream in (streams.OLD, streams.NEW)])
    old, new = drawn[::2], drawn[1::2]
    columns = np.hstack([old, new])
    assert (np.abs(columns.mean(axis=0)) < 4 / np.sqrt(4000)).all()
    assert (np.abs(np.cov(columns.T) - np.eye(4)) < 4 * np.sqrt(2 / 4000)).all()
    uniforms = np.array([streams.uniform(f"d-{n}", streams.ACTION) for n in range(4000)])
    counts = np.histogram(uniforms, 10, (0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(uniforms, old[:, 0])[0, 1]) < 4 / np.sqrt(4000)
