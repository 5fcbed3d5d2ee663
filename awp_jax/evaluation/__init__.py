"""Runs attacks on a model and decides which adversarial examples count.

`evaluate` runs a list of attacks in turn. `protocol` defines what an attack is,
`driver` steps it, `verdicts` checks its candidates, `results` holds the
outcome.
"""
