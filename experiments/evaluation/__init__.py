"""Attacks, landscape and probe of a trained network; their records on disk.

The modes in `experiments.modes` decide what to measure.
"""
