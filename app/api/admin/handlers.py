"""Litestar's route decorators with the scope, the OpenAPI tag and the usual error responses of admins' routes."""

from __future__ import annotations

from functools import partial
from typing import Any

from litestar import delete, get, post

ADMIN: dict[str, Any] = {"scope": "admin"}
admin_get = partial(get, opt=ADMIN, tags=["Admin"])
admin_post = partial(post, opt=ADMIN, tags=["Admin"], status_code=200)
admin_delete = partial(delete, opt=ADMIN, tags=["Admin"])
# Not documented: only the pages send it. Programs use another route for the same.
form_post = partial(post, opt=ADMIN, include_in_schema=False, status_code=200)
