"""The template environment and its filters. Templates escape everything that they print, except markup that a function
of this module built from escaped parts. An undefined name in a template is an error, not an empty string."""

import json
import re
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

import app
from app.api.pages import charts
from app.features import ids
from app.features.clock import EPOCH, MILLISECOND, rfc3339, to_ms
from app.features.registry import Scalar
from app.operations.audit import MAX_REASON
from app.profiles.quality.drift import CommonBin

NAVIGATION = (
    ("/admin", "Overview"),
    ("/admin/data-quality", "Data quality"),
    ("/admin/rebuilds", "Rebuilds"),
    ("/admin/decisions", "Decisions"),
    ("/admin/rollout", "Roll-out"),
    ("/admin/dead-letters", "Dead letters"),
    ("/admin/features", "Features"),
    ("/admin/keys", "Keys"),
    ("/admin/audit", "Audit trail"),
)
OF_SCORING = ("/admin/decisions", "/admin/rollout")
_STEPS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"), (1, "ms"))
MISSING = "–"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PERCENT = re.compile(r"(?<=\d)(\.0)?%")
_CODE = re.compile("⟨U\\+([0-9A-F]+)⟩")


@cache
def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    functions = (
        *(moment, exact, duration, number, percent, fixed, spelled, measured, pretty, shown, visible),
        *(percentages, bin_label, day, timestamp, utc_input),
    )
    made.filters |= {function.__name__: function for function in functions}
    made.filters |= {"visible_text": ids.visible, "decoded": msgspec.json.decode, "fields": msgspec.structs.asdict}
    made.tests["hidden"] = lambda text: ids.visible(text) != text
    made.globals.update(version=app.__version__, axes=charts.Axes, summary=charts.summary, max_reason=MAX_REASON)
    return made


def visible(text: str, *, layout: bool = False) -> Markup:
    """The text with invisible characters as highlighted codes, named on hover. With `layout`, white space is kept."""
    return Markup(_CODE.sub(_marked, escape(ids.visible(text, layout=layout))))  # noqa: S704  # escaped


def _marked(code: re.Match[str]) -> str:
    name = unicodedata.name(chr(int(code[1], 16)), "a character without a name")
    return f'<span class="odd" title="{name.lower()}">{code[0]}</span>'


def in_ms(when: str | int) -> int:
    """A time in milliseconds since 1970. `when` is such a number, or text as in RFC 3339."""
    return when if isinstance(when, int) else to_ms(datetime.fromisoformat(when))


def exact(when: str | int) -> str:
    """A time to the second, as `2026-04-25 06:30:00 UTC`."""
    return (EPOCH + in_ms(when) * MILLISECOND).strftime("%Y-%m-%d %H:%M:%S UTC")


def timestamp(when: str | int) -> Markup:
    """A time to the second, as `exact`. `pages.js` adds the time in the browser's zone."""
    return Markup('<time datetime="{}">{}</time>').format(rfc3339(in_ms(when)), exact(when))  # escapes its arguments


def utc_input(when: str) -> str:
    """A time for an input of the type `datetime-local`: in UTC, without an offset. Other texts are not changed."""
    try:
        at = datetime.fromisoformat(when)
        return (at.astimezone(UTC) if at.tzinfo else at).replace(tzinfo=None).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return when


def day(when: str) -> str:
    """The day of a time, as `5 Apr`."""
    return f"{datetime.fromisoformat(when):%d %b}".lstrip("0")


def moment(when: str | int | None, now_ms: int) -> Markup:
    """A relative time (`3 min ago`, `in 2 h`), with the exact time on hover and in `datetime`; a dash for None."""
    if when is None:
        return Markup(MISSING)  # noqa: S704  # a constant
    ago_ms = now_ms - in_ms(when)
    text = f"{duration(ago_ms)} ago" if ago_ms > 0 else f"in {duration(-ago_ms)}"
    if abs(ago_ms) < 1_000:
        text = "just now"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(rfc3339(in_ms(when)), exact(when), text)


def duration(ms: float | None) -> str:
    """A duration in its two largest units (`2 h 5 min`), or in milliseconds below a second; a dash for None."""
    if ms is None:
        return MISSING
    if ms < 1_000:
        return f"{ms:.0f} ms" if ms >= 10 or ms == int(ms) else f"{ms:.2g} ms"
    if ms < 10_000:
        return f"{ms / 1000:.1f} s".replace(".0 s", " s")
    (size, unit), (smaller, small_unit) = next(steps for steps in pairwise(_STEPS) if ms >= steps[0][0])
    whole, rest = divmod(int(ms), size)
    return f"{whole} {unit}" + (f" {rest // smaller} {small_unit}" if rest >= smaller and whole < 10 else "")


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A number with grouped thousands and its unit; a dash for None. Fractions have `digits` significant digits."""
    if value is None:
        return MISSING
    if isinstance(value, int):
        text = f"{value:,}"  # not with `.0f`: a stored profile may have an int that no float can hold
    elif value == int(value) or abs(value) >= 10**digits:
        text = f"{value:z,.0f}"
    else:
        text = f"{value:,.{digits}g}"
        if "e" in text:
            text = f"{value:z.6f}".rstrip("0").rstrip(".")
    return f"{text} {unit}".rstrip().replace(",", "\u202f")


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a percentage, or a dash for None. Only exactly 0 and 1 are shown as 0 % and 100 %."""
    if share is None:
        return MISSING
    text = f"{share * 100:.1f}".removesuffix(".0")
    if text in ("0", "100") and 0 < share < 1:
        text = "< 0.1" if text == "0" else "> 99.9"
    return text + "\u202f%"


def fixed(value: float, digits: int, *, sign: bool = False) -> str:
    """A number with `digits` decimals, never `-0`."""
    return f"{value:{'+' if sign else ''}z.{digits}f}"


def spelled(sentence: str) -> str:
    """A sentence with its numbers formatted for a page: narrow spaces between thousands and before `%`."""
    return _PERCENT.sub("\u202f%", _THOUSANDS.sub("\u202f", sentence))


def measured(value: float | None, unit: str) -> str:
    """A figure of the overview, or a dash for None. `unit` is `share`, `per_s`, `ms`, `s` or `count`."""
    if unit == "share":
        return percent(value)
    if unit in ("ms", "s"):
        return duration(value and value * (1000 if unit == "s" else 1))
    return number(value, "/s" if unit == "per_s" else "")


def pretty(payload: str) -> str:
    """JSON with indentation; any other text unchanged."""
    try:
        # JSON may hold a lone surrogate, which UTF-8 cannot encode.
        return json.dumps(json.loads(payload), indent=2, ensure_ascii=False).encode().decode()
    except (ValueError, RecursionError):
        return payload


def shown(value: Scalar) -> str:
    """A feature value for a page: `null`, a formatted number, or a string with invisible characters shown."""
    if value is None:
        return "null"
    return visible(value) if isinstance(value, str) else number(value, digits=4)


def percentages(counts: Sequence[int]) -> list[float]:
    """Each count as a percentage of the sum of all counts."""
    return [round(100 * count / (sum(counts) or 1), 2) for count in counts]


def bin_label(part: CommonBin, *, whole: bool) -> str:
    """The label of a bin. If the values are `whole` numbers, a range shows its first and last number, both included."""
    if part.kind in ("null", "other"):
        return part.kind
    if part.kind == "value":
        return _plain(part.value)
    if part.start is None:
        return "any" if part.end is None else f"< {_plain(part.end)}"
    if part.end is None:
        return f"≥ {_plain(part.start)}"
    end = part.end - 1 if whole else part.end
    return _plain(part.start) if end == part.start else f"{_plain(part.start)}–{_plain(end)}"


def _plain(value: Scalar) -> str:
    if not isinstance(value, int | float):
        return value or ""
    return f"{value / 1_000:.6g}k" if abs(value) >= 1_000 and value % 100 == 0 else f"{value:.6g}"
