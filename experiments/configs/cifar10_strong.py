"""TRADES-AWP on CIFAR-10 with a modern recipe and no extra data.

Similar to Gowal et al. 2020 and Pang et al., ICLR 2021: SiLU, a moving
average of the weights, label smoothing, decay of weights only, Nesterov, a
cosine schedule, bfloat16, and model selection on 1,024 held-out training
images.

  python experiments/main.py --config=experiments/configs/cifar10_strong.py

Arguments: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; default WRN-28-10.
Cost: a step takes about 33 forward passes of its batch.

Expected: unknown; this combination was not run at full size.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """TRADES-AWP and `parts.modern`; `argument` as above."""
  config = parts.start(parts.cifar10, argument, 'WRN-28-10')
  parts.modern(config)
  parts.awp(config, gamma=0.005, warmup_epochs=10)
  config.model.dtype = 'bfloat16'
  return config
