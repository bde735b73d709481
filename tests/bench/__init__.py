"""Benchmarks. Each result is a ratio against a reference in the same run, because machines vary."""
