"""Server-sent events, as the HTML standard writes them."""

from __future__ import annotations

from typing import Any

import msgspec

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b": nothing new\n\n"


def retry(after_ms: int) -> bytes:
    """How long a browser shall wait before it comes back."""
    return b"retry: %d\n\n" % after_ms


def event(name: str, event_id: str, body: Any) -> bytes:
    """One event. JSON holds no line break, so it is one line of data."""
    return b"event: %s\nid: %s\ndata: %s\n\n" % (name.encode(), event_id.encode(), msgspec.json.encode(body))
