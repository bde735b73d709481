"""Adds a column to the roll-out: the spec hash of the challenger that the stored stage belongs to."""

from app.migrations import run

revision = "0016"
down_revision = "0015"

# The challenger of the newest shadow. Without shadows: if the stage was ever changed, that of earlier releases,
# `lints-v2`; otherwise null, and the first challenger that runs takes its place.
UPDATE_CHALLENGER = """
UPDATE rollout SET challenger = COALESCE(
    (SELECT spec_hash FROM tip_scores WHERE challenger_p IS NOT NULL AND spec_hash NOT LIKE 'unreadable %'
        ORDER BY number DESC LIMIT 1),
    CASE WHEN changed_at_ms > 0 THEN 'dd4bd9b905e81fe314a0ff986a76f4e3b6f76d11cccbab17fec6650e6248d35b' END
)
"""


def upgrade() -> None:
    run("ALTER TABLE rollout ADD COLUMN challenger TEXT", UPDATE_CHALLENGER)
