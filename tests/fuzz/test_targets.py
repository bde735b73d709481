"""The targets of the fuzzer on its stored corpus and on variations of it, and with broken code; no fuzzer is needed."""

from itertools import count
from urllib.parse import quote

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.profiles.online.cache_protocol import FeatureValue
from app.profiles.ports import Cell
from tests.fuzz import targets
from tests.fuzz.corpus import stored
from tests.fuzz.targets import TARGETS
from tests.support.events import served

TURNS = count()  # a different value each time
STORED = {target: stored(target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_invariant_holds_on_every_input_that_was_found(target: str) -> None:
    assert len(STORED[target]) >= 8
    for raw in STORED[target]:
        TARGETS[target](raw)


@pytest.mark.parametrize("target", TARGETS)
@given(data=st.data())
def test_invariant_holds_when_an_input_is_cut_joined_and_changed(target: str, data: st.DataObject) -> None:
    one, other = (data.draw(st.sampled_from(STORED[target])) for _ in range(2))
    cut = data.draw(st.integers(0, len(one)))
    TARGETS[target](one[:cut] + data.draw(st.binary(max_size=4)) + other[data.draw(st.integers(0, len(other))) :])


def broken_decode(held: bytes | None) -> FeatureValue | None:
    """A codec that cuts the value at a colon."""
    return FeatureValue(b"f", 1, 2, 3, (held or b"").rpartition(b":")[2] + b"!") if held and held[:1] == b"V" else None


def broken_key(epoch: str, cell: Cell) -> bytes:
    """A key that does not escape the escape character."""
    return f"pf:{epoch}:{{{quote(cell.user_id, safe='%')}}}:{cell.feature}".encode()


def broken_problem(value: str) -> None:
    """A rule that accepts every id."""


@pytest.mark.parametrize(
    ("target", "name", "broken", "raw"),
    [
        ("codec", "encode", lambda value: b"V%b:%d:%d:%d:%b!" % value[:5], b"Vf:1:2:3:4"),
        ("codec", "decode", broken_decode, b"Vf:1:2:3:4"),
        ("ids", "key", broken_key, b"a b\na%20b"),
        ("ids", "id_problem", broken_problem, b"a/b\n"),
        ("events", "decode_json", lambda raw: {}[raw], b"[]"),
        ("events", "digest", lambda event: next(TURNS), msgspec.json.encode(served("ada"))),
        ("paths", "_rejection", lambda scope: (500, "x"), b"ada"),
        ("moments", "moment_ms", lambda text, name: next(TURNS), b"x"),
    ],
)
def test_target_notices_when_the_code_is_broken(
    monkeypatch: pytest.MonkeyPatch, target: str, name: str, broken: object, raw: bytes
) -> None:
    TARGETS[target](raw)
    monkeypatch.setattr(targets, name, broken)
    with pytest.raises((AssertionError, KeyError, UnicodeError)):
        TARGETS[target](raw)
