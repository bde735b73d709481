"""Executes the statements of a migration, and reverses those that create tables."""

from collections.abc import Sequence

from alembic import op
from sqlalchemy import text


def run(*statements: str) -> None:
    for statement in statements:
        op.execute(text(statement))


def drop(statements: Sequence[str]) -> None:
    """Drop the tables and sequences that these statements create, the last one first."""
    for statement in reversed(statements):
        kind, name = statement.split()[1:3]
        if statement.startswith("CREATE ") and kind in ("TABLE", "SEQUENCE"):
            run(f"DROP {kind} {name}")
