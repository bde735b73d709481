"""Creates the tables of the feature registries that processes have served, and of disabled features."""

from app.migrations.statements import run

revision = "0005"
down_revision = "0004"

TABLES = (
    # `definitions` is the registry as JSON (`app.features.plan`).
    """CREATE TABLE registries (
        fingerprint TEXT PRIMARY KEY,
        definitions TEXT NOT NULL,
        first_seen_ms INTEGER NOT NULL,
        last_seen_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE disabled_features (
        feature TEXT PRIMARY KEY,
        disabled_by TEXT NOT NULL,
        reason TEXT NOT NULL,
        disabled_at_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
)


def upgrade() -> None:
    run(*TABLES)
