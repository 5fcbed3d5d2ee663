"""Builds the objects of a run from the plain values of a config.

`build` checks every field first, `optimizers` builds optax transformations,
`help` prints the fields.
"""
