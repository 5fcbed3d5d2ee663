"""From the plain values of a config to the objects of a run.

`build` checks every field first; `optimizers` makes optax transformations;
`help` prints the fields.
"""
