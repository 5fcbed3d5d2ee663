r"""TRADES-AWP on CIFAR-10 with a modern recipe and extra images.

Similar to Gowal et al. 2021 and Rebuffi et al. 2021: `cifar10_strong`
with 70 % of each batch from a file of synthetic or pseudo-labeled images,
large batches and a large learning rate.

  python experiments/main.py \
    --config=experiments/configs/cifar10_strong_extra.py \
    --config.extra.path=synthetic.npz

Arguments: `:PreActResNet-18`, `:WRN-34-10`, `:L2`; default WRN-28-10.
Cost: a step takes about 33 forward passes of 1,024 images.

Expected: unknown; this combination was not run at full size.
"""

import ml_collections

from experiments.configs import parts


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """`cifar10_strong` on mixed batches; `argument` as above."""
  config = parts.start(parts.cifar10, argument, 'WRN-28-10')
  parts.modern(config)
  parts.awp(config, gamma=0.005, warmup_epochs=10)
  config.model.dtype = 'bfloat16'
  config.extra.path = 'synthetic.npz'
  config.extra.fraction = 0.7
  config.batch_size = 1024
  config.optimizer.learning_rate = 0.2
  config.epochs = 400
  return config
