"""Benchmarks that need no GPU, apart from the tests: `python -m tests.bench.NAME`."""
