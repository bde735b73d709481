"""Bodies of the route that words a tip."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from app.api.schemas import Moment
from app.errors import FallbackReason
from app.features.ids import Id
from app.features.schema import ProfileFeatures

MAX_TITLE, MAX_NOTES = 300, 4_000
LOCALE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")


class TaskToWord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The task that a tip is about."""

    id: Id
    title: Annotated[str, Meta(min_length=1, max_length=MAX_TITLE, examples=["Renew the passport"])]
    notes: Annotated[str, Meta(max_length=MAX_NOTES, examples=["Photos first. The office opens at 8."])] | None = None
    due_at: Moment | None = None
    priority: Annotated[float, Meta(description="Higher matters more; 3 and above is important.")] | None = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tip to word."""

    task: TaskToWord
    user_id: Id | None = None
    profile_features: Annotated[
        ProfileFeatures | UnsetType | None,
        Meta(description="What to fit it to. Not given: the profile of `user_id` is read. Null: nothing is known."),
    ] = UNSET
    locale: Annotated[
        str,
        Meta(
            description="A BCP 47 tag. Templates know `en` and `de`, for any region; others are worded in English.",
            examples=["de-AT"],
            extra_json_schema={"pattern": f"^{LOCALE.pattern}$"},
        ),
    ] = "en"


class GeneratedTip(msgspec.Struct, kw_only=True):
    """A tip, worded."""

    text: Annotated[str, Meta(description="One paragraph of plain text, at most 500 characters.")]
    source: Literal["model", "template"]
    fallback_reason: Annotated[
        FallbackReason | UnsetType, Meta(description="Why the template stood in for the model that is set.")
    ] = UNSET
    model: Annotated[str | UnsetType, Meta(description="The model that worded it.")] = UNSET
    prompt_version: Annotated[str, Meta(description="Changes with what a model is told.")]
