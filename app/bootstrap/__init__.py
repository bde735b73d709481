"""The composition root: the only package that joins adapters to services."""
