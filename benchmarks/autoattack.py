"""Times AutoAttack `standard` and the reference in turn on the CPU.

  python benchmarks/autoattack.py fixture.npz data_dir --count 1000 \
      [--reference path/to/auto-attack] [--rounds 2] [--model resnet]

`data_dir` is the folder of a cifar10 prepared by tfds. The reference needs
PyTorch; `--python` names another interpreter that has it. Each side runs in its
own process: every batch size of its list on a few examples, then the fastest on
all. Ours runs twice in one process, with compiling and after it
(`--repeats 1`: once).

With `--attack_dtype bfloat16` our attacks run in bfloat16 with XLA's oneDNN
convolutions (jax 0.12 or newer); verdicts stay in float32.
"""

import argparse
from collections.abc import Callable
import functools
from importlib import metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {'ours': (16, 32, 64, 128), 'reference': (50, 100, 250, 500)}


def load_images(
    data_dir: str, count: int, image_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
  """First `count` test images of CIFAR-10, [N, H, W, 3] in [0, 1].

  Smaller images than 32 x 32 are averaged as by the config field `image_size`.
  """
  import tensorflow_datasets as tfds

  from experiments.data import arrays

  source = tfds.data_source('cifar10', split='test', data_dir=data_dir)
  rows = [source[i] for i in range(count)]
  images = np.stack([row['image'] for row in rows])
  images = arrays.averaged(
      images, arrays.block_of(images.shape, image_size, 'CIFAR-10'))
  return images.astype(np.float32) / 255, np.asarray(
      [row['label'] for row in rows], np.int32)


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
  """Times evaluations with our library; the first one compiles."""
  import autoattack_fixture
  from flax import traverse_util
  import jax
  import jax.numpy as jnp

  from awp_jax import models
  from awp_jax.attacks import autoattack
  from awp_jax.evaluation.evaluate import EvalOptions
  from awp_jax.threat import ThreatModel

  # The second evaluation reuses the programs that the first one compiled.
  jax.config.update('jax_compilation_cache_dir', tempfile.mkdtemp(
      dir=os.path.dirname(job['data'])))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  data = np.load(job['data'])
  if job['model'] == 'resnet':
    flat = dict(np.load(job['weights']))
    variables = traverse_util.unflatten_dict(flat, sep='/')
    classes = len(flat['params/linear/bias'])
    width = flat['params/conv1/kernel'].shape[-1]

    def network(dtype: str) -> Callable[[jax.Array], jax.Array]:
      model = models.PreActResNet(
          num_classes=classes, width=width, dtype=jnp.dtype(dtype))
      return lambda x: model.apply(variables, x, train=False)
  else:
    network = functools.partial(
        autoattack_fixture.network, np.load(job['fixture']))
  logits_fn, dtype = network('float32'), job['attack_dtype']
  labels = data['labels']
  if job['own_labels']:
    labels = np.concatenate([
        np.asarray(jax.jit(logits_fn)(part).argmax(-1), np.int32)
        for part in np.array_split(data['images'], 8)])
  seconds, robust = [], 0
  for _ in range(job['repeats']):
    begin = time.perf_counter()
    result = autoattack.auto_attack(
        jax.random.key(0), logits_fn, data['images'], labels,
        ThreatModel(job['norm'], job['epsilon']), version=job['version'],
        options=EvalOptions(
            batch_size=job['batch_size'],
            attack_fn=None if dtype == 'float32' else network(dtype)))
    seconds.append(time.perf_counter() - begin)
    robust = int(result.robust.sum())
  return {'seconds': seconds, 'robust': robust,
          'attacks': {a.name: a.seconds for a in result.attacks},
          'refused': {a.name: a.anomalies.refused for a in result.attacks},
          'warnings': [warning.message for warning in result.warnings],
          'verdicts': np.packbits(result.robust).tobytes().hex()}


def torch_model(job: dict[str, Any]) -> Any:
  """The job's network in PyTorch, with the sizes of its file."""
  import torch
  from torch import nn

  if job['model'] == 'resnet':
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import torch_preact_resnet

    return torch_preact_resnet.load(np.load(job['weights']))
  fixture = np.load(job['fixture'])
  state = {name.removeprefix('param/'): torch.tensor(fixture[name])
           for name in fixture if name.startswith('param/')}
  kernels = [value for name, value in state.items() if value.ndim == 4]
  # Convolutions have the indices 0, 2, 4, ...; a ReLU follows each.
  layers: list[Any] = []
  for i in range(len(kernels)):
    out, into, size, _ = state[f'{2 * i}.weight'].shape
    layers += [nn.Conv2d(into, out, size, 2 if i else 1, 1), nn.ReLU()]
  classes, features = state[f'{len(layers) + 2}.weight'].shape
  model = nn.Sequential(
      *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
      nn.Linear(features, classes))
  model.load_state_dict(state)
  return model.eval()


def run_reference(job: dict[str, Any]) -> dict[str, Any]:
  """Times the reference on the same images."""
  sys.path.insert(0, job['reference'])
  from autoattack import AutoAttack
  import torch

  data = np.load(job['data'])
  images = torch.tensor(data['images'].transpose(0, 3, 1, 2).copy())
  model = torch_model(job)
  labels = torch.tensor(data['labels']).long()
  if job['own_labels']:
    with torch.no_grad():
      labels = torch.cat([model(p).argmax(1) for p in images.split(64)])
  attack = AutoAttack(
      model, norm=job['norm'], eps=job['epsilon'], device='cpu', seed=0,
      verbose=False, version='custom' if job['version'] == 'fast' else
      job['version'],
      attacks_to_run=['apgd-ce', 'apgd-t'] if job['version'] == 'fast' else [])
  if job['version'] == 'fast':
    attack.apgd.n_restarts = 1
  begin = time.perf_counter()
  found = attack.run_standard_evaluation(images, labels, bs=job['batch_size'])
  seconds = time.perf_counter() - begin
  with torch.no_grad():
    robust = torch.cat([
        model(x).argmax(1) == y for x, y in zip(
            found.split(250), labels.split(250), strict=True)]).numpy()
  return {'seconds': [seconds], 'robust': int(robust.sum()),
          'verdicts': np.packbits(robust).tobytes().hex()}


def draw_weights(job: dict[str, Any]) -> dict[str, Any]:
  """Saves the flat variables of a PreActResNet-18 with random weights."""
  from flax import traverse_util
  import jax

  from awp_jax import models

  model = models.PreActResNet(num_classes=10)
  shape = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), shape)
  flat = traverse_util.flatten_dict(variables, sep='/')
  np.savez(job['weights'], **{k: np.asarray(v) for k, v in flat.items()})
  return {}


SIDES = {'ours': run_ours, 'reference': run_reference, 'draw': draw_weights}


def spawn(side: str, job: dict[str, Any], python: str) -> dict[str, Any]:
  """Runs one side in its own process."""
  from experiments.util import xla

  here = pathlib.Path(__file__)
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(
      [str(ROOT), str(here.parent)])}
  if job['attack_dtype'] != 'float32':
    environment['XLA_FLAGS'] = xla.with_onednn(
        os.environ.get('XLA_FLAGS', ''), metadata.version('jaxlib'))
  done = subprocess.run(
      [python, str(here), '--side', side, json.dumps(job)],
      capture_output=True, text=True, check=False, env=environment)
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return json.loads(done.stdout.strip().splitlines()[-1])


def best_size(
    side: str, job: dict[str, Any], python: str, sizes: tuple[int, ...],
    data: str) -> int:
  """Finds the fastest batch size on a few examples, version 'fast'."""
  took = {}
  for size in sizes:
    trial = {**job, 'data': data, 'batch_size': size, 'version': 'fast',
             'repeats': 2}
    took[size] = spawn(side, trial, python)['seconds'][-1]
  print(side, 'seconds by batch size', took, flush=True)
  return min(took, key=lambda size: took[size])


def compare(arguments: argparse.Namespace) -> None:
  """Chooses batch sizes, alternates full runs and prints the ratios."""
  job = {
      'model': arguments.model, 'norm': arguments.norm,
      'epsilon': arguments.epsilon, 'fixture': arguments.fixture,
      'version': arguments.version, 'reference': arguments.reference,
      'attack_dtype': arguments.attack_dtype, 'repeats': arguments.repeats,
      'weights': arguments.weights,
      # Random weights: the model's own predictions are the labels, so that
      # all examples are attacked.
      'own_labels': arguments.model == 'resnet' and not arguments.weights}
  sides = {'ours': sys.executable}
  if arguments.reference:
    sides['reference'] = arguments.python
  with tempfile.TemporaryDirectory() as folder:
    if job['own_labels']:
      job['weights'] = f'{folder}/weights.npz'
      spawn('draw', job, sys.executable)
    files = []
    for name, count in (('all', arguments.count), ('few', arguments.trial)):
      images, labels = load_images(
          arguments.data_dir, count, arguments.image_size)
      files.append(f'{folder}/{name}.npz')
      np.savez(files[-1], images=images, labels=labels)
    sizes = {}
    for side, python in sides.items():
      tried = arguments.sizes or SIZES[side]
      sizes[side] = tried[0] if len(tried) == 1 else best_size(
          side, job, python, tried, files[1])
    took: dict[str, list[list[float]]] = {side: [] for side in sides}
    found: dict[str, str] = {}
    for turn in range(arguments.rounds):
      for side, python in sides.items():
        outcome = spawn(
            side, {**job, 'data': files[0], 'batch_size': sizes[side]}, python)
        took[side].append(outcome['seconds'])
        found[side] = outcome.pop('verdicts')
        print('round', turn, side, 'batch size', sizes[side], outcome,
              flush=True)
  first = min(t[0] for t in took['ours'])
  later = min(t[-1] for t in took['ours'])
  print(f'ours: {first:.1f} s with compiling, {later:.1f} s after it')
  if 'reference' in took:
    theirs = min(t[0] for t in took['reference'])
    print('verdicts that differ:', *np.flatnonzero(np.logical_xor(*(
        np.unpackbits(np.frombuffer(
            bytes.fromhex(found[side]), np.uint8)) for side in found))))
    print(f'reference: {theirs:.1f} s; {theirs / first:.2f} and '
          f'{theirs / later:.2f} times ours')


def main() -> None:
  """Parses the command line."""
  if len(sys.argv) == 4 and sys.argv[1] == '--side':
    print(json.dumps(SIDES[sys.argv[2]](json.loads(sys.argv[3]))))
    return
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('fixture', help="npz with the fixture's network")
  parser.add_argument('data_dir', help='folder of a prepared cifar10')
  parser.add_argument('--reference', help='a checkout of fra31/auto-attack')
  parser.add_argument('--python', default=sys.executable)
  parser.add_argument('--model', default='fixture',
                      choices=('fixture', 'resnet'))
  parser.add_argument('--weights', help='npz of flat Flax variables of the '
                      'resnet, params/conv1/kernel...; random by default')
  parser.add_argument('--norm', default='Linf')
  parser.add_argument('--epsilon', type=float, default=8 / 255)
  parser.add_argument('--version', default='standard')
  parser.add_argument('--count', type=int, default=1000)
  parser.add_argument('--image_size', type=int, default=32,
                      choices=(4, 8, 16, 32), help='height and width')
  parser.add_argument('--trial', type=int, default=64,
                      help='examples used to choose the batch size')
  parser.add_argument('--sizes', type=int, nargs='*')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--repeats', type=int, default=2,
                      help='evaluations by ours in one process')
  parser.add_argument('--attack_dtype', default='float32',
                      choices=('float32', 'bfloat16'))
  compare(parser.parse_args())


if __name__ == '__main__':
  main()
