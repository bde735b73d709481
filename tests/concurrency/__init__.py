"""Batching, load estimates and periodic work."""
