"""AT on scikit-learn's handwritten digits: the baseline of `digits_awp`.

  python experiments/main.py --config=experiments/configs/digits_at.py
"""

import ml_collections

from experiments.configs import digits_awp


def get_config() -> ml_collections.ConfigDict:
  """`digits_awp` without the weight perturbation."""
  config = digits_awp.get_config()
  config.awp.gamma = 0.0
  return config
