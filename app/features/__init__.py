"""Features: the registry that declares them, their types for consumers, and the events that they are computed from."""
