"""Requests for tips: an example, and a strategy for everything that the API accepts."""

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import strategies as st

from app.generation.languages import phrases_of
from app.generation.tip_request import ALLOWED, Mood, TipRequest, Traits, traits_of

NOW = datetime(2026, 11, 25, 9, 30, tzinfo=UTC)
HABITS = {
    "completion_rate_30d": 0.8,
    "dismiss_rate_30d": 0.05,
    "mean_dwell_ms_30d": 9_000.0,
    "preferred_hour": 9,
    "tip_volume_30d": 40,
}
FINISHER = traits_of(HABITS)

OFFSETS = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
NEAR = st.timedeltas(timedelta(days=-400), timedelta(days=400)).map(lambda apart: NOW + apart)
MOMENTS = st.datetimes(timezones=OFFSETS) | st.tuples(NEAR, OFFSETS).map(lambda pair: pair[0].astimezone(pair[1]))
PIECES = (
    *("word", "«mot»", "„Wort“", "“", '"', "…", "!"),
    *("https://x.example", "a.m.", "**", "[ ]", "\u202e", "👩\u200d👧"),
)
# Any text that JSON can contain: many scripts, invisible characters, and text that resembles the marks.
TEXTS = st.one_of(
    st.text(max_size=300),
    st.text(st.characters(categories=["Cc", "Cf", "Zs", "Zl", "Zp"]), max_size=40),
    st.text("<>/task-\\u003c\"'`\n{}[]: abc", max_size=300),
    st.lists(
        st.sampled_from(PIECES),
        max_size=60,
    ).map(" ".join),
)
PRIORITIES = st.none() | st.floats(allow_nan=False, allow_infinity=False)
LOCALES = st.sampled_from(["en", "en-GB", "en-US", "de", "de-AT", "DE", "fr", "zh-Hant-TW", "xx"]) | st.from_regex(
    r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}", fullmatch=True
)
FEATURES = st.none() | st.dictionaries(
    st.sampled_from([*ALLOWED, "snooze_rate_30d"]),
    st.none()
    | st.floats(0, 1)
    | st.floats()
    | st.integers()
    | st.integers(0, 23)
    | st.text(max_size=5)
    | st.booleans(),
)
REQUESTS = st.builds(
    TipRequest,
    title=TEXTS.filter(bool),
    notes=st.none() | TEXTS,
    due_at=st.none() | MOMENTS,
    priority=PRIORITIES,
    traits=FEATURES.map(traits_of),
    locale=LOCALES,
    now=st.just(NOW),
)


def tip_request(
    title: str = "Renew the passport",
    *,
    notes: str | None = None,
    due_at: datetime | None = None,
    priority: float | None = None,
    traits: Traits = Traits(),  # noqa: B008  # immutable
    locale: str = "en",
    now: datetime = NOW,
) -> TipRequest:
    return TipRequest(title=title, notes=notes, due_at=due_at, priority=priority, traits=traits, locale=locale, now=now)


def with_first_variant(text: str, mood: Mood, locale: str = "en") -> str:
    """The text of a template with the first encouragement for the mood, in place of the one for the task and day."""
    first, *others = phrases_of(locale).encouragement[mood]
    for other in others:
        text = text.replace(other, first)
    return text
