"""AT-AWP on CIFAR-10, L_inf 8/255, PreActResNet-18: the paper's main setting.

Paper: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust
Generalization", NeurIPS 2020; every value is that of the released AT_AWP code.

  python experiments/main.py --config=experiments/configs/cifar10_awp.py

Expected, from the authors' log of seed 0 (PGD-20 robust accuracy, per cent):
best 55.39, mean of the last six epochs 54.73, natural accuracy at best 81.18.
Their run took 22 hours (302 s of training and 98 s of testing an epoch) on
hardware of 2020 that they do not name. `docs/results/` has what was measured
with this code, and on what.

Every other config starts from this one, so every field is here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """All fields, with the paper's values."""
  config = ml_collections.ConfigDict()
  config.seed = 0

  # Data. 0 examples means all of them.
  config.dataset = 'cifar10'  # cifar10, cifar100, svhn, digits, npz
  config.data_dir = ''  # a folder of prepared TFDS data sets, if not the usual
  config.npz_path = ''  # for npz: x_train, y_train, x_test, y_test
  config.num_train = 0  # class-balanced subset of the training images
  config.num_test = 0
  config.num_validation = 0  # held out from the training images
  config.augmentation = ml_collections.ConfigDict({
      'pad': 4,  # pixels, before a random crop; 0: no crop
      'pad_mode': 'reflect',  # reflect, constant (black)
      'flip': True,  # left to right, half of the time
  })

  config.model = ml_collections.ConfigDict({
      'name': 'preact_resnet',  # preact_resnet, wide_resnet
      'depth': 18,  # 18, 34, 50; wide: 6 n + 4
      'width': 64,  # channels of the first stage; wide: the widening factor
      'activation': 'relu',  # relu, silu
      'dtype': 'float32',  # to compute in: float32, bfloat16, float64
      'param_dtype': 'float32',
  })

  # What inputs ascend and weights descend.
  config.objective = 'AT'  # AT, TRADES, MART
  config.beta = 6.0  # of TRADES and MART
  config.threat = ml_collections.ConfigDict({
      'norm': 'Linf',  # Linf, L2
      'epsilon': 8 / 255,
  })
  config.attack = ml_collections.ConfigDict({
      'step_size': 2 / 255,
      'num_steps': 10,
      'start': 'random',  # random, gaussian, zero
      'restarts': 1,
      'mode': 'train',  # batch normalisation in the attack: train, eval
  })
  config.awp = ml_collections.ConfigDict({
      'gamma': 0.01,  # 0: off
      'num_steps': 1,
      'alternations': 1,
      'warmup_epochs': 0,  # epochs without AWP, at no cost
      'decay_at': 'perturbed',  # weight decay at w + v or at w: natural
  })
  config.statistics = 'reference'  # or perturbed: only the pass at w + v

  config.epochs = 200
  config.batch_size = 128  # over all devices; the smaller last one is kept
  config.optimizer = ml_collections.ConfigDict({
      'learning_rate': 0.1,
      'momentum': 0.9,
      'weight_decay': 5e-4,  # on every parameter
      'decay_factor': 0.1,  # of the learning rate, at each of:
      'decay_at': (0.5, 0.75),  # fractions of the run
  })

  # Evaluation after every `every_epochs` epochs, and after the last.
  config.eval = ml_collections.ConfigDict({
      'every_epochs': 1,
      'batch_size': 128,
      'step_size': 2 / 255,
      'num_steps': 20,
      'num_train': 1000,  # training images for the accuracies on them
  })
  # --mode=evaluate: each starts from all test images. fgsm, pgd-N, cw-N, spsa,
  # one attack of AutoAttack (apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square), or
  # a version of it: aa-standard, aa-plus, aa-rand, aa-fast.
  config.evaluation = ml_collections.ConfigDict({
      'attacks': ('fgsm', 'pgd-20', 'pgd-100', 'cw-100', 'aa-standard'),
      'num_examples': 0,  # the first of the test images; 0: all
      'batch_size': 0,  # 0: as the device likes
      'save_examples': False,  # adversarial images, an .npz each
      'torch_checkpoint': '',  # a PyTorch file instead of the run's own
  })
  # --mode=landscape: the loss around the weights, with filter-normalised random
  # directions; PGD with attack.step_size makes new examples at every point.
  config.landscape = ml_collections.ConfigDict({
      'num_train': 1000,  # training images; 0: all
      'num_test': 1000,
      'num_directions': 3,
      'points': 21,  # along each direction, an odd number
      'range': 1.0,  # from -range to range, in units of |w|
      'adversarial_range': 0.05,  # along the worst direction; 0: not at all
      'plane_points': 11,  # a side, over two directions; 0: no plane
      'num_steps': 10,  # of PGD
      'batch_size': 0,  # over all devices; 0: as they like
      'seed': 0,  # of the directions: the same for runs to be compared
  })
  config.select_on = 'test'  # the best model by: test (the paper), validation
  config.log_every_steps = 50
  config.checkpoint_every_steps = 0  # beside the end of every epoch; 0: never
  return config
