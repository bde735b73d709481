"""Batching, load estimates and admission control, independent of the domain."""
