"""Sweeps over configs and seeds: jobs, their processes, their results."""
