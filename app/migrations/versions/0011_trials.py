"""Adds the salt that decides which users a roll-out's challenger serves, and a table for the shadow scores of a third
policy, which uses the pooled prior but not the profile."""

from app.migrations import run

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    run(
        # The first salt is that of earlier releases, so that a roll-out in progress keeps its users.
        "ALTER TABLE rollout ADD COLUMN salt TEXT NOT NULL DEFAULT '1'",
        "CREATE TABLE pool_shadows (number INTEGER PRIMARY KEY, pool_p REAL NOT NULL, v_pool REAL NOT NULL) STRICT",
    )
