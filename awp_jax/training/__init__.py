"""Training and evaluation steps, and the training state.

`train_step` composes an attack on the inputs with a weight perturbation, and
`eval_step` measures natural and robust accuracy.
"""
