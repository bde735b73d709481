"""Which ids are allowed, and how a moment is written."""

import unicodedata
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from app.features.clock import rfc3339, to_ms
from app.features.ids import all_allowed, id_problem, visible


def test_id_is_allowed_when_it_keeps_the_rules() -> None:
    for value in ("a", "x" * 128, "…", "a b", "%2F", "{u}", "😀" * 128, "...", "a.", "user@example.org"):
        assert id_problem(value) is None, value


def test_id_is_refused_when_it_breaks_a_rule() -> None:
    for reason, values in {
        "empty": [""],
        "at most 128 characters, has 129": ["x" * 129],
        "must not be . or ..": [".", ".."],
        "must not contain /": ["a/b"],
    }.items():
        for value in values:
            assert reason in (id_problem(value) or ""), value
    for code in (0x0, 0xA, 0x7F, 0x9F, 0xD800, 0xDFFF):
        assert f"U+{code:04X}" in (id_problem(f"a{chr(code)}b") or "")


odd_ids = st.one_of(
    st.text(st.sampled_from("a./\n…\ud800"), max_size=3), st.integers(127, 130).map(lambda length: "x" * length)
)


@given(st.lists(odd_ids, max_size=4))
def test_ids_are_all_allowed_when_no_id_breaks_a_rule(ids: list[str]) -> None:
    assert all_allowed(ids) == all(id_problem(value) is None for value in ids)


SHOWN = {
    "Ada Lovelace": "Ada Lovelace",
    "Zoë …😀नमस्ते": "Zoë …😀नमस्ते",
    "ada ": "ada⟨U+0020⟩",
    " ada": "⟨U+0020⟩ada",
    "a  b": "a ⟨U+0020⟩b",
    " ": "⟨U+0020⟩",
    "a\u200bda": "a⟨U+200B⟩da",
    "\u202eada": "⟨U+202E⟩ada",
    "ada\u00a0": "ada⟨U+00A0⟩",
    "a\u2003b": "a⟨U+2003⟩b",
    "a\u00adb": "a⟨U+00AD⟩b",
    "\u2066a\u2069": "⟨U+2066⟩a⟨U+2069⟩",
    "\u3164": "⟨U+3164⟩",
    "\u2800": "⟨U+2800⟩",
    "a\ufe0f": "a⟨U+FE0F⟩",
    "a\U000e0041": "a⟨U+E0041⟩",
    "a\ue000": "a⟨U+E000⟩",
    "e\u0301": "e⟨U+0301⟩",
    "\u0301e": "⟨U+0301⟩e",
    "\u212b": "⟨U+212B⟩",
    "\u1100\u1161": "\u1100⟨U+1161⟩",
    "a⟨U+200B⟩": "a⟨U+27E8⟩U+200B⟩",
}


def test_hidden_characters_of_an_id_are_shown() -> None:
    for value, shown in SHOWN.items():
        assert id_problem(value) is None, ascii(value)
        assert visible(value) == shown, ascii(value)


@given(st.text(), st.text())
def test_two_texts_never_look_alike(one: str, other: str) -> None:
    shown = visible(one)
    assert not {unicodedata.category(char) for char in shown.replace(" ", "")} & {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}
    assert " ".join(shown.split()) == shown
    assert unicodedata.is_normalized("NFC", shown)
    assert (shown == visible(other)) == (one == other)


def test_layout_stays_when_it_is_text_of_several_lines() -> None:
    assert visible('{\n  "a":\t" \u200b"\n}', layout=True) == '{\n  "a":\t" ⟨U+200B⟩"\n}'


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001  # Hypothesis wants naive bounds
def test_moment_survives_its_text_form_when_cut_to_milliseconds(moment: datetime) -> None:
    moment_ms = to_ms(moment)
    read = datetime.fromisoformat(rfc3339(moment_ms))
    assert to_ms(read) == moment_ms
    assert 0 <= (moment - read).total_seconds() < 0.001
