"""Every field of a config, with its values for AT on CIFAR-10.

The other files change a few of them with the functions of `parts`. On the
command line a field is set by `--config.<group>.<field>=<value>`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The paper's setting without weight perturbation; all options off."""
  config = ml_collections.ConfigDict()
  # Fields of your own: set them in your config file.
  config.user = ml_collections.ConfigDict()
  for add in (_add_data, _add_model, _add_objective, _add_optimization,
              _add_evaluation, _add_landscape):
    add(config)
  return config


def _add_data(config: ml_collections.ConfigDict) -> None:
  config.seed = 0  # for initial weights, order of images and noise
  # Selects the subsets (num_train, num_test) and the validation images: runs
  # that differ only in `seed` use the same data.
  config.data_seed = 0

  # 0 examples means all of them.
  # cifar10, cifar100, svhn, digits, npz, or my_package.module:load, which
  # returns arrays x_train, y_train, x_test and y_test by name.
  config.dataset = 'cifar10'
  config.data_dir = ''  # folder of prepared TFDS data sets; empty: default
  config.npz_path = ''  # for npz: x_train, y_train, x_test, y_test
  config.num_train = 0  # class-balanced subset of the training images
  config.num_test = 0
  # Side of the images after averaging squares of pixels, such as 16 for 32.
  config.image_size = 0  # 0: as they are stored
  config.num_validation = 0  # held out from the training images
  # More training images, with the extra ones, stay on the host and are passed
  # to the devices step by step. 0: all stay there. Changes no number.
  config.data_on_device_gib = 4.0
  config.extra = ml_collections.ConfigDict({
      'path': '',  # images with (pseudo-)labels: .npz, .pickle, folder
      'fraction': 0.0,  # share of each batch, in [0, 1)
  })
  config.augmentation = ml_collections.ConfigDict({
      'pad': 4,  # pixels, before a random crop; 0: no crop
      'pad_mode': 'reflect',  # reflect, constant (black)
      'flip': True,  # left to right, half of the time
      'rotation': 0.0,  # largest angle in degrees
      'cutout': 0,  # side of a black square, in pixels
      'mixup': 0.0,  # alpha of Beta(alpha, alpha)
      'function': '',  # of a PRNG key and an image: my_package.module:name
  })


def _add_model(config: ml_collections.ConfigDict) -> None:
  config.model = ml_collections.ConfigDict({
      # preact_resnet, resnet, wide_resnet, or a linen, nnx or Equinox module of
      # yours, my_package.module:Net, with options in parentheses or as fields
      # of model.kwargs in your config file.
      'name': 'preact_resnet',
      'kwargs': ml_collections.ConfigDict(),
      'depth': 18,  # 10, 18, 34, 50; wide: 6 n + 4; resnet: 18 to 152
      'width': 64,  # channels of the first stage; wide: the widening factor
      'activation': 'relu',  # relu, silu
      'normalize': True,  # pixels, by the data set's mean and std
      'dtype': 'float32',  # of computations: float32, bfloat16, float64
      'param_dtype': 'float32',
      'sync_batch_norm': False,  # batch statistics over all devices
      'remat': False,  # recompute activations: less memory, a third more work
  })
  # Initial weights: a PyTorch file (.pt, .pth, .tar), or the workdir of a run,
  # of which the best checkpoint is used. A classifier with another number of
  # classes is initialized randomly. Empty: all weights random.
  config.init_from = ''


def _add_objective(config: ml_collections.ConfigDict) -> None:
  # AT, TRADES, MART, natural, or my_package.module:make, which returns an
  # awp_jax.Objective.
  config.objective = 'AT'
  config.beta = 6.0  # of TRADES and MART
  config.label_smoothing = 0.0  # in the cross-entropy of the training loss
  config.threat = ml_collections.ConfigDict({
      'norm': 'Linf',  # Linf, L2
      'epsilon': 8 / 255,
  })
  config.attack = ml_collections.ConfigDict({
      # pgd, or my_package.module:attack with the arguments of
      # awp_jax.pgd_with_state. Evaluation during training always uses PGD.
      'name': 'pgd',
      'step_size': 2 / 255,
      'num_steps': 10,
      'start': 'random',  # random, gaussian, zero
      'restarts': 1,
      'mode': 'train',  # batch normalization in the attack: train, eval
  })
  # The weight perturbation: `awp` with the options of the group below, or any
  # method of awp_jax.methods with its options, such as
  # 'rwp(gamma=0.01, c_min=1.7)', 'sam(rho=0.05)' or 'awp(every=2)', or
  # my_package.module:make, which returns an awp_jax.Method.
  # Alternations and warm-up always come from the group; 'awp(...)' also takes
  # the options that it does not set.
  config.weight_perturbation = 'awp'
  config.awp = ml_collections.ConfigDict({
      'gamma': 0.0,  # 0: off
      'num_steps': 1,
      'alternations': 1,
      'warmup_epochs': 0,  # epochs without AWP, at no extra cost
      'warmup_steps': 0,  # alternative to warmup_epochs
      'update_at': 'perturbed',  # optimizer receives w + v; natural: w
  })
  config.statistics = 'reference'  # or perturbed: only the pass at w + v


def _add_optimization(config: ml_collections.ConfigDict) -> None:
  config.epochs = 200
  config.batch_size = 128  # over all devices; a smaller last one is kept
  config.accumulate = 1  # parts of a device's batch, processed in turn
  config.optimizer = ml_collections.ConfigDict({
      # sgd, adamw, or my_package.module:make, a function of learning_rate (and
      # of fields below) that returns an optax optimizer.
      'name': 'sgd',
      'learning_rate': 0.1,
      'momentum': 0.9,  # adamw: b1
      'nesterov': False,
      'b2': 0.999,  # adamw only
      'weight_decay': 5e-4,  # sgd: in the gradient; adamw: decoupled from it
      'l1': 0.0,  # l1 * sign(w) in the gradient of weights
      'decay': 'all',  # parameters with weight_decay: all, weights
      'clip_norm': 0.0,  # maximum norm of the whole gradient; 0: none
      'schedule': 'steps',  # steps, epochs, cosine, one_cycle
      'warmup_epochs': 0.0,  # epochs of rising rate, also for one_cycle
      'decay_factor': 0.1,  # for steps and epochs, applied at each of:
      'decay_at': (0.5, 0.75),  # fractions of the run
  })
  # Moving average of weights and batch statistics, used for evaluation. The
  # decay at step t is min(ema_decay, (1 + t) / (10 + t)). 0: none.
  config.ema_decay = 0.0
  # Stop after this many epochs without a better robust accuracy (select_on).
  config.early_stopping_epochs = 0  # 0: never
  config.log_every_steps = 50  # also lines of steps.jsonl
  # Besides metrics.jsonl and steps.jsonl: tensorboard, wandb, mlflow, or
  # my_package.module:Writer.
  config.loggers = ('tensorboard',)
  config.checkpoint_every_steps = 0  # besides every epoch; 0: never

  # Detects a failed run: a loss or an accuracy no better than chance for
  # `stretch_steps`, after the first `grace_steps` and the warm-up of AWP; a
  # gradient of zero; or non-finite metrics.
  config.guard = ml_collections.ConfigDict({
      'action': 'stop',  # stop; shrink: go back, with gamma * factor
      'grace_steps': 2000,
      'stretch_steps': 1000,
      'factor': 0.5,
      'most_shrinks': 5,
  })


def _add_evaluation(config: ml_collections.ConfigDict) -> None:
  config.select_on = 'test'  # selects the best: test (paper), validation
  # Evaluation after every `every_epochs` epochs, and after the last.
  config.eval = ml_collections.ConfigDict({
      'every_epochs': 1,
      'batch_size': 128,
      'step_size': 2 / 255,
      'num_steps': 20,
      'num_train': 1000,  # training images to evaluate
  })
  # --mode=evaluate: each attack runs on all test images. fgsm, pgd-N, cw-N,
  # spsa, one attack of AutoAttack (apgd-ce, apgd-dlr, apgd-t, fab, fab-t,
  # square), or a version of it: aa-standard, aa-plus, aa-fast; or
  # my_package.module:make, which returns an awp_jax.AttackSpec.
  config.evaluation = ml_collections.ConfigDict({
      'attacks': ('fgsm', 'pgd-20', 'pgd-100', 'cw-100', 'aa-standard'),
      'epsilons': (),  # rising radii of a curve of robust accuracy; (): none
      'curve_attacks': ('apgd-ce', 'apgd-t'),  # of the curve
      'num_examples': 0,  # the first of the test images; 0: all
      'batch_size': 0,  # 0: chosen for the device
      'attack_dtype': 'float32',  # bfloat16: faster; float32 still decides
      'save_examples': False,  # adversarial images, one .npz per attack
      'torch_checkpoint': '',  # a PyTorch file instead of the run's model
  })


def _add_landscape(config: ml_collections.ConfigDict) -> None:
  # --mode=landscape: the loss around the weights, along filter-normalized
  # random directions. PGD with attack.step_size attacks anew at every point.
  config.landscape = ml_collections.ConfigDict({
      'num_train': 1000,  # training images; 0: all
      'num_test': 1000,
      'num_directions': 3,
      'points': 21,  # along each direction, an odd number
      'range': 1.0,  # from -range to range, in units of |w|
      'adversarial_range': 0.05,  # along the worst direction; 0: none
      'plane_points': 11,  # per side, over two directions; 0: no plane
      'num_steps': 10,  # of PGD
      'batch_size': 0,  # over all devices; 0: chosen for them
      'seed': 0,  # of the directions; keep it equal to compare runs
  })
