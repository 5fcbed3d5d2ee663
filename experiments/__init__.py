"""Training, evaluation and plots of the paper, built on `awp_jax`."""
