"""Adds summaries of samples, from which the overview draws the last days.

Revision ID: 0012
"""

from alembic import op
from sqlalchemy import text

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    integer, string, options = ("INTEGER", "TEXT", "STRICT") if sqlite else ("BIGINT", 'TEXT COLLATE "C"', "")
    op.execute(
        text(
            f"""CREATE TABLE sample_summaries (
            at_ms {integer} NOT NULL,
            role {string} NOT NULL,
            body {string} NOT NULL,
            PRIMARY KEY (at_ms, role)
        ) {options}"""
        )
    )


def downgrade() -> None:
    op.execute(text("DROP TABLE sample_summaries"))
