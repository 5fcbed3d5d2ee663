"""Networks of the paper, in flax.linen."""

from awp_jax.models.preact_resnet import PreActResNet as PreActResNet
from awp_jax.models.resnet import ResNet as ResNet
from awp_jax.models.wide_resnet import WideResNet as WideResNet
