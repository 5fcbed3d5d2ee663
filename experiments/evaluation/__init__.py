"""Measurements of a trained network and their records on disk.

The modes in `experiments.modes` decide what is measured.
"""
