"""Timings; nothing here is run by the tests."""
