"""Compares cached values with the event log and with a recomputation."""
