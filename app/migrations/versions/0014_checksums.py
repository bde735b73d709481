"""Adds two checksums to users' sufficient statistics: of the spec and the number of decisions, and of the sums."""

from app.migrations import run

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    # Null until this release first writes the row; processes of an earlier release insert no value, and keep one.
    run(
        "ALTER TABLE bandit_states ADD COLUMN header_crc32 INTEGER",
        "ALTER TABLE bandit_states ADD COLUMN evidence_crc32 INTEGER",
    )
