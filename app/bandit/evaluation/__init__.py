"""The decision log for analysis, and the evaluation of policies that never served."""
