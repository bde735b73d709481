"""Adds an index of the pooled priors by spec, so that a query for a spec without a prior reads no other priors."""

from app.migrations import run

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    run("CREATE INDEX bandit_priors_by_spec ON bandit_priors (spec_hash, version)")
