"""Benchmarks: timings, verdicts, reference data and mutation tests."""
