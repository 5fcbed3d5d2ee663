"""Exchanges weights with PyTorch: reads and writes its state dicts and files.

    state_dict = read_state_dict('model_best.pth')
    model = model_from_torch(state_dict, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    variables = from_torch(state_dict, model)
    logits = model.apply(variables, images)           # images [B, H, W, C]

    write_state_dict('ours.pth', to_torch(variables, model))
    # net.load_state_dict(torch.load('ours.pth', weights_only=True))

Names are those of the AWP authors' repository, csdongxian/AWP, and RobustBench.
The logits are equal at 32x32 pixels. At other sizes our networks average all of
the last features, while theirs pool with a fixed size.

A PyTorch network takes normalized images, and few files contain the
normalization. Our networks normalize inside and need `mean` and `std`:

* (0.4914, 0.4822, 0.4465) and (0.2471, 0.2435, 0.2616): AT-AWP of CIFAR-10;
  RobustBench's Rice2020Overfitting, Chen2020Efficient and
  Kireev2021Effectiveness of CIFAR-10.
* (0.5070751592371323, 0.48654887331495095, 0.4409178433670343) and
  (0.2673342858792401, 0.2564384629170883, 0.27615047132568404): AT-AWP of
  CIFAR-100; RobustBench's Wu2020Adversarial and Rice2020Overfitting of
  CIFAR-100.
* 0.5 and 0.5: AT-AWP of SVHN; Hendrycks2019Using, Hendrycks2020AugMix_WRN.
* 0 and 1, the default: TRADES-AWP and RST-AWP; RobustBench's Wu2020Adversarial
  of CIFAR-10 and all entries that are a bare `WideResNet(...)` or
  `PreActResNet(...)` there.

By their definitions, these RobustBench entries for CIFAR-10 and CIFAR-100 are
the same networks (not every file was tried):

* each entry that uses its `WideResNet`, of any depth and width:
  Carmon2019Unlabeled, Wu2020Adversarial, Rice2020Overfitting (CIFAR-10, L_inf),
  Sehwag2021Proxy, Zhang2019Theoretically and so on. `sub_block1`, if present,
  does not affect the logits and is dropped. Augustin2020 and Rony2019 use
  different means. Ding2020MMA has matching names, but normalizes each image
  separately, which our networks do not.
* PreActResNet-18 of Rice2020Overfitting (CIFAR-10, L_2; CIFAR-100),
  Kireev2021Effectiveness (`read_state_dict(path, key='last')`) and
  Addepalli2021Towards_PARN18.

These have other layouts, and the normalization of their RobustBench entries:

* PreActResNet-18 of Andriushchenko2020Understanding and Wong2020Fast: no
  normalization before the classifier, and shortcuts of features that are not
  normalized (`final_norm=False`, `shortcut='plain'`); the means and standard
  deviations of CIFAR-10 above.
* DMWideResNet and DMPreActResNet (Gowal2020Uncovering, Gowal2021Improving,
  Rebuffi2021Fixing, Wang2023Better, ...): padded on one side at stride 2
  (`padding='after'`), with SiLU; the means and standard deviations of CIFAR-10
  above, of CIFAR-100 (0.5071, 0.4865, 0.4409) and (0.2673, 0.2564, 0.2762).
* ResNet-18 to -152 that normalize after convolutions: Sehwag2021Proxy_R18 (0
  and 1), Engstrom2019Robustness (means of CIFAR-10, standard deviations
  (0.2023, 0.1994, 0.2010)), ...

Rejected, because names differ or a tensor is missing: Pang2020Boosting,
ImageNet networks, and ensembles.
"""

from awp_jax.models.torch_exchange.convert import from_torch as from_torch
from awp_jax.models.torch_exchange.convert import normalization as normalization
from awp_jax.models.torch_exchange.convert import to_torch as to_torch
from awp_jax.models.torch_exchange.files import (
    read_state_dict as read_state_dict,
)
from awp_jax.models.torch_exchange.files import (
    write_state_dict as write_state_dict,
)
from awp_jax.models.torch_exchange.recognize import (
    model_from_torch as model_from_torch,
)
