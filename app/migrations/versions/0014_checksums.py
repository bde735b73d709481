"""Adds checksums to users' sufficient statistics: of their spec and number of decisions, and of their numbers.

Revision ID: 0014
"""

from alembic import op
from sqlalchemy import text

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

COLUMNS = ("header_crc32", "evidence_crc32")


def upgrade() -> None:
    integer = "INTEGER" if op.get_context().dialect.name == "sqlite" else "BIGINT"
    # Null until this release first writes the row; processes of an earlier release insert no value, and keep one.
    for column in COLUMNS:
        op.execute(text(f"ALTER TABLE bandit_states ADD COLUMN {column} {integer}"))


def downgrade() -> None:
    for column in COLUMNS:
        op.execute(text(f"ALTER TABLE bandit_states DROP COLUMN {column}"))
