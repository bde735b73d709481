"""The evaluation of policies that never served."""
