"""The roll-out: stages, off-policy estimates, guardrails and verdicts."""
