"""The staged roll-out of the challenger: stages, off-policy estimates, guardrails and verdicts."""
