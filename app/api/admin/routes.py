"""The admins' routes, by module. All but signing in need the scope `admin`."""

from __future__ import annotations

from app.api.admin import (
    audit_trail,
    dead_letters,
    features,
    overview,
    quality,
    rebuild_events,
    rebuild_forms,
    rebuilds,
    search,
    sign_in,
    user_development,
    user_erasure,
    user_rebuild,
    users,
)

ADMIN_ROUTES = [
    overview.get_overview,
    search.get_users,
    users.get_user,
    user_development.get_development,
    user_rebuild.rebuild_user,
    user_erasure.get_erasure,
    user_erasure.erase_user_by_form,
    user_erasure.erase_user,
    quality.get_quality,
    rebuilds.start_rebuild,
    rebuilds.get_rebuilds,
    rebuilds.get_rebuild,
    rebuilds.cancel_rebuild,
    rebuild_events.follow_rebuild,
    rebuild_forms.cancel_from_page,
    dead_letters.get_letters,
    dead_letters.get_letter,
    dead_letters.replay_letters,
    dead_letters.replay_letter,
    dead_letters.discard_letter,
    dead_letters.discard_from_page,
    audit_trail.get_audit,
    features.get_catalogue,
    sign_in.get_sign_in,
    sign_in.post_sign_in,
    sign_in.post_sign_out,
]
