"""Extensions that schemathesis loads: newline-delimited JSON, times that are accepted, and ids that exist.

`tests.fuzz.openapi` passes the ids in the environment. Whether a case gets one depends on the case alone, so that a run
can be repeated.
"""

import json
import os
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.parameters import ParameterLocation

from app.features.events import SERVED
from tests.fuzz.openapi import IDS_VARIABLE

_IDS: dict[str, list[Any]] = json.loads(os.environ.get(IDS_VARIABLE, "{}"))
_NOW = datetime.now(UTC)

_ZONES = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-3, minutes=-30))]

_TIMES = st.builds(
    lambda ago_s, zone: (_NOW - timedelta(seconds=ago_s)).astimezone(zone).isoformat(),
    st.integers(60, 25 * 86_400),
    st.sampled_from(_ZONES),
)
_IDENTIFIERS = st.text("abcdefgh-0123456789", min_size=1, max_size=8)
_EVENTS = st.fixed_dictionaries(
    {
        "subject": st.just(SERVED),
        "occurred_at": _TIMES,
        **dict.fromkeys(("event_id", "user_id", "tip_id"), _IDENTIFIERS),
    },
    optional={"decision_id": st.none() | _IDENTIFIERS},
)

schemathesis.openapi.format("date-time", _TIMES)
# Of newline-delimited JSON, a schema says only that it is `binary`.
schemathesis.openapi.format(
    "binary", st.lists(_EVENTS, min_size=1, max_size=20).map(lambda events: "\n".join(map(json.dumps, events)))
)


@schemathesis.serializer("application/x-ndjson")
def lines(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """Send text and bytes unchanged, and other values as JSON."""
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case[Any], __: dict[str, Any]) -> None:
    """Use an id that exists in about half of the cases with a valid path."""
    drawn = zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode())
    if drawn % 2 or case.meta is None:
        return
    path = case.meta.components.get(ParameterLocation.PATH)
    if path is not None and path.mode.is_positive:
        for name, known in _IDS.items():
            if name in case.path_parameters:
                case.path_parameters[name] = known[drawn // 2 % len(known)]
