"""Adds summaries of metric samples. The overview page draws the last days from them."""

from app.migrations import run

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    run(
        """CREATE TABLE sample_summaries (
            at_ms INTEGER NOT NULL,
            role TEXT NOT NULL,
            body TEXT NOT NULL,
            PRIMARY KEY (at_ms, role)
        ) STRICT"""
    )
