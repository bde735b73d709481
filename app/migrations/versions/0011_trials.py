"""Adds the salt that decides which users a roll-out's challenger serves, and a table for the shadows of a third policy,
which has the pooled prior but not the profile.

Revision ID: 0011
"""

from functools import reduce

from alembic import op
from sqlalchemy import text

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


# The first salt is that of earlier releases, so that a roll-out in progress keeps its users.
STATEMENTS = (
    "ALTER TABLE rollout ADD COLUMN salt TEXT NOT NULL DEFAULT '1'",
    "CREATE TABLE pool_shadows (number INTEGER PRIMARY KEY, pool_p REAL NOT NULL, v_pool REAL NOT NULL) STRICT",
)
POSTGRES = {" TEXT": ' TEXT COLLATE "C"', " INTEGER": " BIGINT", " REAL": " DOUBLE PRECISION", ") STRICT": ")"}


def upgrade() -> None:
    types = {} if op.get_context().dialect.name == "sqlite" else POSTGRES
    for statement in STATEMENTS:
        op.execute(text(reduce(lambda typed, name: typed.replace(name, types[name]), types, statement)))


def downgrade() -> None:
    op.execute(text("DROP TABLE pool_shadows"))
    op.execute(text("ALTER TABLE rollout DROP COLUMN salt"))
