"""Adds the salt of a roll-out, and the table of the policy that has the pooled prior without the profile.

Revision ID: 0011
"""

from alembic import op
from sqlalchemy import text

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    integer, real = ("INTEGER", "REAL") if sqlite else ("BIGINT", "DOUBLE PRECISION")
    # That of earlier releases, so that a roll-out in progress keeps its users.
    op.execute(text("ALTER TABLE rollout ADD COLUMN salt TEXT NOT NULL DEFAULT '1'"))
    columns = f"number {integer} PRIMARY KEY, pool_p {real} NOT NULL, v_pool {real} NOT NULL"
    op.execute(text(f"CREATE TABLE pool_shadows ({columns})"))


def downgrade() -> None:
    op.execute(text("DROP TABLE pool_shadows"))
    op.execute(text("ALTER TABLE rollout DROP COLUMN salt"))
