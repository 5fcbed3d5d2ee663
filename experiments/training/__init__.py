"""The training loop and its compiled step.

`loop` orchestrates. `compiled` caches the programs of `step`; `training_data`
gives them their batches. `saving` writes and restores checkpoints, `guard`
stops failed runs, which `collapse` detects, `signals` turns SIGTERM and Ctrl-C
into a request to stop, `epochs` and `progress` write the output.
"""
