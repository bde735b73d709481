"""Comparing cached values with a recomputation."""
