"""A run and its folder: config, checkpoints, metrics, precision of evaluation.

`run` prepares a run, `workdirs` reads and checks its folder, `restore` and
`warm_start` load trained networks.
"""
