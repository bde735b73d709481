"""Features of a user, as the profile service serves them. Written by `profiles features --format python`."""

from typing import Annotated, ClassVar

from msgspec import UNSET, Meta, Struct, UnsetType


class ProfileFeatures(Struct, kw_only=True, frozen=True):
    """A feature is UNSET if it was not asked for, and None if nothing is known."""

    completion_rate_30d: Annotated[
        float | UnsetType | None,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'completed', 0 to 1."),
    ] = UNSET
    dismiss_rate_30d: Annotated[
        float | UnsetType | None,
        Meta(description="Share of the user's tip feedback of the last 30 days that is 'dismissed', 0 to 1."),
    ] = UNSET
    mean_dwell_ms_30d: Annotated[
        float | UnsetType | None,
        Meta(
            description="Mean time a tip was on screen over the last 30 days, in milliseconds, where the time is known."
        ),
    ] = UNSET
    preferred_hour: Annotated[
        int | UnsetType | None,
        Meta(
            description="Local hour of the day (0 to 23) in which the user completed most tips over the last 30 days."
        ),
    ] = UNSET
    tip_volume_30d: Annotated[
        int | UnsetType | None,
        Meta(description="How many tips the user was served over the last 30 days."),
    ] = UNSET
    FINGERPRINTS: ClassVar[dict[str, str]] = {
        "completion_rate_30d": "4b6492ae",
        "dismiss_rate_30d": "8122a968",
        "mean_dwell_ms_30d": "ddcefd37",
        "preferred_hour": "c2b63a09",
        "tip_volume_30d": "f6c079ac",
    }
