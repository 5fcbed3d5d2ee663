"""AWP and its relatives by name.

  >>> method = make('rwp', c_min=4.0)
  >>> method.num_steps, method.ball.norm, method.examples_below
  (10, 'tree', 4.0)
  >>> make('rwp', cmin=4.0)
  Traceback (most recent call last):
    ...
  ValueError: option of method 'rwp' must be one of 'gamma', 'c_min', \
'num_steps', 'mask', 'update_at', 'stack_axes', 'start', 'every', got 'cmin'. \
Did you mean 'c_min'?

`docs/weight_perturbation.md` has the table of settings, and which method
reduces to which. Every method takes its free settings as keywords.
`start_after` and `every_k` restrict any method to some steps.
"""

from awp_jax.perturbation.methods.catalog import METHODS as METHODS
from awp_jax.perturbation.methods.catalog import every_k as every_k
from awp_jax.perturbation.methods.catalog import make as make
from awp_jax.perturbation.methods.catalog import scaled as scaled
from awp_jax.perturbation.methods.catalog import start_after as start_after
from awp_jax.perturbation.methods.gradient_based import asam as asam
from awp_jax.perturbation.methods.gradient_based import awp as awp
from awp_jax.perturbation.methods.gradient_based import boxed_awp as boxed_awp
from awp_jax.perturbation.methods.gradient_based import (
    momentum_awp as momentum_awp,
)
from awp_jax.perturbation.methods.gradient_based import rwp as rwp
from awp_jax.perturbation.methods.gradient_based import sam as sam
from awp_jax.perturbation.methods.gradient_based import sign as sign
from awp_jax.perturbation.methods.gradient_based import wt_awp as wt_awp
from awp_jax.perturbation.methods.noise_based import arwp as arwp
from awp_jax.perturbation.methods.noise_based import (
    cosine_increase as cosine_increase,
)
from awp_jax.perturbation.methods.noise_based import frwp as frwp
from awp_jax.perturbation.methods.noise_based import m_arwp as m_arwp
from awp_jax.perturbation.methods.noise_based import m_rwp as m_rwp
from awp_jax.perturbation.methods.noise_based import random as random
