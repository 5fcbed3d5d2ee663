"""Restores the models of a run for evaluation, or a PyTorch file."""

from collections.abc import Callable, Iterator, Sequence
import functools
import hashlib
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from awp_jax.models import torch_exchange
from experiments.config import networks, schema
from experiments.runs import precision, reading
from experiments.runs import run as run_lib
from experiments.util import digests
from experiments.util.errors import UserError, user_errors


class RestoredModel(NamedTuple):
  """A model under evaluation.

  Attributes:
    name: 'best', 'last', or 'torch-' and the stem of a PyTorch file.
    origin: identifies the checkpoint, as plain values.
    facts: everything that its logits depend on, as plain values.
    network: from `precision.network`.
    variables: in float32.
  """

  name: str
  origin: dict[str, Any]
  facts: dict[str, Any]
  network: nn.Module
  variables: dict[str, Any]

  @property
  def logits_fn(self) -> Callable[[Any], Any]:
    """Images [B, ...] -> logits [B, C], in float32."""
    return functools.partial(precision.logits, self.network, self.variables)

  def attack_fn(self, dtype: str) -> Callable[[Any], Any] | None:
    """`logits_fn` computed in another type for attacks; None for float32."""
    if dtype == precision.PRECISION:
      return None
    return functools.partial(
        precision.logits, precision.network(self.network, dtype),
        self.variables)


def restore_models(
    run: run_lib.Run, kinds: Sequence[str] = reading.KINDS
) -> Iterator[RestoredModel]:
  """Loads the models to evaluate, one at a time.

  Args:
    run: from `run.reopen`.
    kinds: kinds of its checkpoints; ignored if the config names a PyTorch file.

  Yields:
    The models.

  Raises:
    UserError: if a checkpoint is missing or unreadable.
  """
  settings = run.config.evaluation
  if settings.torch_checkpoint:
    yield _torch_model(run, pathlib.Path(settings.torch_checkpoint))
    return
  network = precision.network(run.model)
  for kind, step, variables in load_variables(run, kinds):
    yield RestoredModel(
        kind, {'checkpoint': kind, 'step': step}, network_facts(run) | {
            'weights': digests.of_arrays(variables)}, network, variables)


def load_variables(
    run: run_lib.Run, kinds: Sequence[str] = reading.KINDS
) -> Iterator[tuple[str, int, dict[str, Any]]]:
  """Loads the variables to evaluate from a run's checkpoints.

  Args:
    run: from `run.reopen`.
    kinds: kinds of its checkpoints.

  Yields:
    Kind, step and variables in float32; of the moving average, if there is one.

  Raises:
    UserError: if a checkpoint is missing or unreadable.
  """
  image = jax.ShapeDtypeStruct(
      (1, *run.dataset.x_train.shape[1:]), jnp.float32)
  like = jax.eval_shape(
      functools.partial(run.model.init, train=False), jax.random.key(0), image)
  for kind in kinds:
    stored = reading.read_variables(run.workdir, kind)
    reading.check_same(
        like, stored.tree, run.workdir / 'checkpoints' / kind)
    yield kind, stored.step, precision.variables(stored.tree)


def network_facts(run: run_lib.Run) -> dict[str, Any]:
  """What a network's logits depend on besides its weights, as plain values."""
  model = {
      name: value for name, value in schema.flatten(run.config.model).items()
      if name not in ('dtype', 'param_dtype', 'remat')}
  return networks.source(run.config) | {
      'model': model, 'mean': list(run.dataset.mean),
          'std': list(run.dataset.std)}


@user_errors()
def _torch_model(run: run_lib.Run, path: pathlib.Path) -> RestoredModel:
  state_dict = torch_exchange.read_state_dict(path)
  mean, std = torch_exchange.normalization(state_dict) or (
      tuple(run.dataset.mean), tuple(run.dataset.std))
  model = torch_exchange.model_from_torch(state_dict, mean=mean, std=std)
  classes = getattr(model, 'num_classes', None)
  if classes != run.dataset.num_classes:
    raise UserError(
        f'{path} classifies into {classes} classes, {run.dataset.name} has '
        f'{run.dataset.num_classes}.')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  variables = torch_exchange.from_torch(state_dict, model)
  return RestoredModel(
      f'torch-{path.stem}', {'torch_checkpoint': path.name, 'sha256': digest},
      {'weights': digest, 'mean': list(mean), 'std': list(std)},
      precision.network(model), precision.variables(variables))
