"""The training loop and its compiled step.

`loop` orchestrates. `compiled` caches the programs defined in `step`, `saving`
writes and restores checkpoints, `guard` stops failed runs, which `collapse`
detects, `epochs` and `progress` write the output.
"""
