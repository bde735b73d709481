"""Extensions that schemathesis loads: newline-delimited JSON, times that are accepted, and ids that exist.

`tests.fuzz.openapi` passes the ids in the environment. Whether a case gets one depends on the case alone, so that a run
can be repeated.
"""

from __future__ import annotations

import json
import os
import zlib
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis.core.parameters import ParameterLocation

IDS_VARIABLE = "FUZZ_IDS"
_IDS: dict[str, list[Any]] = json.loads(os.environ.get(IDS_VARIABLE, "{}"))
_NOW = datetime.now(UTC)

_ZONES = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-3, minutes=-30))]

schemathesis.openapi.format(
    "date-time",
    st.builds(
        lambda ago_s, zone: (_NOW - timedelta(seconds=ago_s)).astimezone(zone).isoformat(),
        st.integers(60, 25 * 86_400),
        st.sampled_from(_ZONES),
    ),
)


@schemathesis.serializer("application/x-ndjson")
def lines(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """Write one item a line. A string is sent unchanged."""
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    return b"\n".join(json.dumps(item).encode() for item in (value if isinstance(value, list) else [value]))


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
