"""The training loop and its compiled step.

`loop` holds the state between steps, `step` builds the compiled functions,
`collapse` stops a network that stops learning.
"""
