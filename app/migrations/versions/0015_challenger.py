"""Adds the challenger that the stage of the roll-out belongs to: the hash of its spec.

Revision ID: 0015
"""

from alembic import op
from sqlalchemy import text

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

# The challenger of the releases before. A deployment with more inputs has another one, which its shadows tell.
LINTS_V2 = "dd4bd9b905e81fe314a0ff986a76f4e3b6f76d11cccbab17fec6650e6248d35b"
# A roll-out that no one has moved, and without shadows, is that of whichever challenger comes first: null.
UPDATE_CHALLENGER = """
UPDATE rollout SET challenger = COALESCE(
    (SELECT spec_hash FROM tip_scores WHERE challenger_p IS NOT NULL ORDER BY number DESC LIMIT 1),
    CASE WHEN changed_at_ms > 0 THEN :v2 END
)
"""


def upgrade() -> None:
    kind = "TEXT" if op.get_context().dialect.name == "sqlite" else 'TEXT COLLATE "C"'
    op.execute(text(f"ALTER TABLE rollout ADD COLUMN challenger {kind}"))
    op.execute(text(UPDATE_CHALLENGER).bindparams(v2=LINTS_V2))


def downgrade() -> None:
    op.execute(text("ALTER TABLE rollout DROP COLUMN challenger"))
