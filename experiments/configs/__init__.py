"""Configs as plain values, one file per run."""
