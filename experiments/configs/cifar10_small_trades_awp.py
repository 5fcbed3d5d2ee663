"""TRADES-AWP in the small setting of CIFAR-10, which overfits in minutes.

  python experiments/main.py \
    --config=experiments/configs/cifar10_small_trades_awp.py

The setting is `parts.cifar10_small`; `docs/results/evidence.md` has results.
"""

import ml_collections

from experiments.configs import base, parts


def get_config() -> ml_collections.ConfigDict:
  """TRADES-AWP on 2,500 images; the warm-up is 5 % of the epochs."""
  config = base.get_config()
  parts.cifar10_small(config)
  parts.objective(config, 'TRADES', beta=6.0)
  parts.awp(config, gamma=0.005, warmup_epochs=2)
  return config
