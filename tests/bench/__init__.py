"""Benchmarks: ratios against a reference in the same run, for machines are noisy. `make bench` runs them all."""
