"""The registry of features, their definitions and typed mirror, and the events they are computed from. No I/O."""
