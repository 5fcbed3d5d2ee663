"""Where metrics go besides `metrics.jsonl`: TensorBoard, W&B, MLflow, or yours.

A writer gets the lines of epochs and of steps. Those of a package that is not
installed are refused before training.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib.util
import json
import numbers
import os
import pathlib
import secrets
import tempfile
import time
from typing import Any, Protocol

from experiments.util import atomic, named, paths
from experiments.util.errors import UserError


class Writer(Protocol):
  """Receives metrics; `open_all` says how it is made."""

  def epoch(self, line: Mapping[str, Any]) -> None:
    """Takes the line of an epoch; line['epoch'] counts from 1."""
    ...

  def step(self, line: Mapping[str, Any]) -> None:
    """Takes means over the steps up to line['step']."""
    ...

  def close(self) -> None:
    """Writes what is left."""
    ...


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a line, without 'epoch' and 'step'."""
  return {
      name: float(value) for name, value in line.items()
      if name not in ('epoch', 'step') and isinstance(value, numbers.Real)}


class TensorBoard:
  """TensorBoard events: of epochs in `tensorboard`, of steps below it.

  A resumed run replaces later events, which TensorBoard does for all events of
  a folder, so epochs and steps need separate ones.
  """

  def __init__(
      self, workdir: paths.Path, name: str, config: Mapping[str, Any],
      epoch: int, step: int) -> None:
    """Opens event files that replace the events of later epochs and steps.

    Args:
      workdir: the run's folder.
      name: of the run; not used.
      config: its fields; not used.
      epoch: number of completed epochs.
      step: number of completed steps.
    """
    del name, config
    folder = workdir / 'tensorboard'
    self._epochs = _Events(folder, epoch + 1)
    self._steps = _Events(folder / 'steps', step + 1)

  def epoch(self, line: Mapping[str, Any]) -> None:
    """Adds the numbers of an epoch."""
    self._epochs.add(scalars(line), line['epoch'])
    self._epochs.flush()
    self._steps.flush()

  def step(self, line: Mapping[str, Any]) -> None:
    """Adds the numbers of steps, under 'step/'."""
    self._steps.add({
        f'step/{name}': value for name, value in scalars(line).items()},
        line['step'])

  def close(self) -> None:
    """Writes what is left and closes the files."""
    self._epochs.close()
    self._steps.close()


class _Events:
  """One event file; that of a bucket is written locally and copied.

  tensorboardX's `SummaryWriter` writes in a thread. On a full disk the thread
  ends, and the caller then waits for it without end.
  """

  def __init__(self, folder: paths.Path, purge_step: int) -> None:
    # It imports PyTorch, if that is installed.
    event_file: Any = importlib.import_module('tensorboardX.event_file_writer')
    proto: Any = importlib.import_module('tensorboardX.proto.event_pb2')
    self._scalar = importlib.import_module('tensorboardX.summary').scalar
    self._event = proto.Event
    self._folder = folder
    self._local = (
        tempfile.TemporaryDirectory() if paths.is_bucket(folder) else None)
    place = pathlib.Path(self._local.name if self._local else str(folder))
    place.mkdir(parents=True, exist_ok=True)
    # Its name has the second only, and a run may start twice in one.
    self._file = event_file.EventsWriter(
        str(place / 'events'), f'.{secrets.token_hex(4)}')
    self._file.write_event(self._event(
        step=purge_step, file_version='brain.Event:2'))
    self._file.write_event(self._event(
        step=purge_step,
        session_log=proto.SessionLog(status=proto.SessionLog.START)))

  def add(self, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
      self._file.write_event(self._event(
          wall_time=time.time(), step=step, summary=self._scalar(name, value)))

  def flush(self) -> None:
    self._file.flush()
    self._copy()

  def _copy(self) -> None:
    if self._local:
      for file in pathlib.Path(self._local.name).iterdir():
        with atomic.replacing(self._folder / file.name) as copy:
          copy.write(file.read_bytes())

  def close(self) -> None:
    self._file.close()
    self._copy()
    if self._local:
      self._local.cleanup()


class WeightsAndBiases:
  """A run of Weights & Biases, which the same workdir resumes.

  `WANDB_PROJECT` and `WANDB_MODE=offline` work as usual.
  """

  def __init__(
      self, workdir: paths.Path, name: str, config: Mapping[str, Any],
      epoch: int, step: int) -> None:
    """Starts or resumes the run.

    Args:
      workdir: the run's folder; it keeps the id of the W&B run.
      name: of the run.
      config: its fields.
      epoch: number of completed epochs; not used.
      step: number of completed steps; not used.
    """
    del epoch, step
    wandb: Any = importlib.import_module('wandb')
    path = workdir / 'wandb.json'
    stored = json.loads(path.read_text())['id'] if path.exists() else None
    local = tempfile.gettempdir() if paths.is_bucket(workdir) else str(workdir)
    self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'awp_jax'), name=name,
        dir=local, config=dict(config), id=stored, resume='allow')
    if stored is None:
      atomic.write_json(path, {'id': self._run.id})
    for axis in ('epoch', 'step'):
      self._run.define_metric(f'{axis}/*', step_metric=axis)

  def _log(self, axis: str, line: Mapping[str, Any]) -> None:
    self._run.log({
        axis: line[axis],
        **{f'{axis}/{name}': value for name, value in scalars(line).items()}})

  def epoch(self, line: Mapping[str, Any]) -> None:
    """Logs the numbers of an epoch under 'epoch/'."""
    self._log('epoch', line)

  def step(self, line: Mapping[str, Any]) -> None:
    """Logs the numbers of steps under 'step/'."""
    self._log('step', line)

  def close(self) -> None:
    """Ends the run's process; the workdir can resume it."""
    self._run.finish()


class MLflow:
  """A run of MLflow, which the same workdir resumes.

  `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` work as usual. Without the
  first, runs are kept in `mlflow.db` beside the workdir, or in the current
  folder for one in a bucket.
  """

  def __init__(
      self, workdir: paths.Path, name: str, config: Mapping[str, Any],
      epoch: int, step: int) -> None:
    """Starts or resumes the run.

    Args:
      workdir: the run's folder; it keeps the id of the MLflow run.
      name: of the run.
      config: its fields.
      epoch: number of completed epochs; not used.
      step: number of completed steps; not used.
    """
    del epoch, step
    mlflow: Any = importlib.import_module('mlflow')
    beside = pathlib.Path() if paths.is_bucket(workdir) else (
        pathlib.Path(str(workdir)).parent)
    place = os.environ.get('MLFLOW_TRACKING_URI') or (
        f'sqlite:///{beside.absolute()}/mlflow.db')
    self._client = mlflow.MlflowClient(tracking_uri=place)
    path = workdir / 'mlflow.json'
    if path.exists():
      self._id = json.loads(path.read_text())['id']
      return
    experiment = os.environ.get('MLFLOW_EXPERIMENT_NAME', 'awp_jax')
    found = self._client.get_experiment_by_name(experiment)
    self._id = self._client.create_run(
        found.experiment_id if found else (
            self._client.create_experiment(experiment)),
        run_name=name).info.run_id
    for field, value in config.items():
      self._client.log_param(self._id, field, value)
    atomic.write_json(path, {'id': self._id})

  def epoch(self, line: Mapping[str, Any]) -> None:
    """Logs the numbers of an epoch under their names."""
    for name, value in scalars(line).items():
      self._client.log_metric(self._id, name, value, step=line['epoch'])

  def step(self, line: Mapping[str, Any]) -> None:
    """Logs the numbers of steps under 'step/'."""
    for name, value in scalars(line).items():
      self._client.log_metric(
          self._id, f'step/{name}', value, step=line['step'])

  def close(self) -> None:
    """Marks the run as ended; the workdir can go on with it."""
    self._client.set_terminated(self._id)


#: Name -> (writer, the package that it needs).
WRITERS: dict[str, tuple[Callable[..., Writer], str]] = {
    'tensorboard': (TensorBoard, 'tensorboardX'),
    'wandb': (WeightsAndBiases, 'wandb'), 'mlflow': (MLflow, 'mlflow')}

DEFAULT = ('tensorboard',)


def check(names: Sequence[str]) -> None:
  """Raises UserError for an unknown writer or one that is not installed."""
  if not all(isinstance(name, str) for name in names):
    raise UserError(
        f'loggers must be names, as in {tuple(WRITERS)}, got {tuple(names)}.')
  if len(set(names)) < len(names):
    raise UserError(f'loggers has a name more than once: {tuple(names)}.')
  for name in names:
    if named.is_external(name):
      named.load('loggers', named.parse_call(name, 'loggers')[0])
    elif name not in WRITERS:
      raise UserError(
          f'loggers must be of {", ".join(WRITERS)}, or '
          f'my_package.module:Writer, got {name!r}.')
    elif importlib.util.find_spec(WRITERS[name][1]) is None:
      package = WRITERS[name][1]
      raise UserError(
          f'loggers: {name!r} needs the package {package}: pip install '
          f'{package}.')


def open_all(
    names: Sequence[str], workdir: paths.Path, config: Mapping[str, Any],
    epoch: int, step: int) -> list[Writer]:
  """Opens writers of a run.

  Args:
    names: of `WRITERS`, or 'package.module:Writer' with options in parentheses:
      a class or function that is called with those of `workdir`, `name`,
      `config`, `epoch` and `step` that it takes, and returns a `Writer`.
    workdir: the run's folder.
    config: its fields by dotted name.
    epoch: number of completed epochs.
    step: number of completed steps.

  Returns:
    The writers.

  Raises:
    UserError: as `check`, or if a writer of another package fails.
  """
  check(names)
  opened: list[Writer] = []
  for name in names:
    offered: dict[str, Any] = {
        'workdir': workdir, 'name': workdir.name, 'config': config,
        'epoch': epoch, 'step': step}
    if named.is_external(name):
      call, options = named.parse_call(name, 'loggers')
      opened.append(named.call(
          'loggers', named.load('loggers', call), call, options=options,
          offered=offered))
    else:
      opened.append(WRITERS[name][0](**offered))
  return opened
