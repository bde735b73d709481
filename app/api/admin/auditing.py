"""Who acts, and how their actions enter the audit trail."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from app.api.auth.authentication import Caller
from app.api.dependencies import HttpRequest, service_of
from app.operations import audit


def caller(request: HttpRequest) -> Caller:
    """Who asks."""
    known: Caller = request.scope["user"]
    return known


def audited(request: HttpRequest, action: str, subject: str) -> AbstractAsyncContextManager[audit.AuditedAction]:
    """Around what an admin does: the intent is written before, what came of it after; see `app.operations.audit`."""
    service = service_of(request)
    return audit.audited(service.audit_trail, service.clock.now_ms(), caller(request).name, action, subject)
