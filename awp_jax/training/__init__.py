"""Training and evaluation steps on batches, and the state that they update.

`train_step` composes an attack on the inputs with a weight perturbation, and
`eval_step` measures natural and robust accuracy.
"""
