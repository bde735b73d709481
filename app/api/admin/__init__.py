"""Admins' routes: users, rebuilds, data quality, roll-out, dead letters, features, audit trail.

Each route answers a browser with a page and other clients with JSON. Every change is recorded in the audit trail.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from litestar import delete, get, post

# The scope, the OpenAPI tag and the usual status of all of them.
ADMIN: dict[str, Any] = {"scope": "admin"}
admin_get = partial(get, opt=ADMIN, tags=["Admin"])
admin_post = partial(post, opt=ADMIN, tags=["Admin"], status_code=200)
admin_delete = partial(delete, opt=ADMIN, tags=["Admin"])
# Not documented: only the pages send it. Programs use another route for the same.
form_post = partial(post, opt=ADMIN, include_in_schema=False, status_code=200)
