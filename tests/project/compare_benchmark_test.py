"""Both sides of benchmarks/compare compute the same; the runner resumes."""

import functools
import importlib
import json
import pathlib
import re
import sys
import types

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compare import cases, machine, main, runner, table, worker
from benchmarks.compare.cases import Case
from experiments.configs import cifar10_at, cifar10_awp, cifar10_trades_awp

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'
RIVALS = (cases.TUNED, cases.COMPILED, cases.RELEASED)

# The interface of the released code, whose weight adversaries are closed forms
# here: v = gamma |w| g / |g| in every weight of more than one dimension.
ADVERSARY = '''
import torch
from torch.nn import functional as F

class Adversary:
  def __init__(self, model, proxy, proxy_optim, gamma):
    self.model, self.gamma = model, gamma
    assert proxy is not model and proxy_optim.param_groups

  def calc_awp(self, inputs_adv, targets, inputs_clean=None, beta=None):
    params = [w for w in self.model.parameters() if w.ndim > 1]
    logits = self.model(inputs_adv)
    if beta is None:
      loss = F.cross_entropy(logits, targets)
    else:
      natural = self.model(inputs_clean)
      p = natural.softmax(1)
      rows = p * (natural.log_softmax(1) - logits.log_softmax(1))
      loss = F.cross_entropy(natural, targets) + beta * rows.sum(1).mean()
    grads = torch.autograd.grad(loss, params)
    return [self.gamma * w.detach().norm() * g / g.norm()
            for w, g in zip(params, grads)]

  def move(self, diff, sign):
    params = [w for w in self.model.parameters() if w.ndim > 1]
    with torch.no_grad():
      for w, d in zip(params, diff):
        w.add_(sign * d)

  def perturb(self, diff):
    self.move(diff, 1)

  def restore(self, diff):
    self.move(diff, -1)

AdvWeightPerturb = TradesAWP = Adversary
'''


@pytest.fixture
def released(tmp_path):
  """A folder laid out like csdongxian/AWP."""
  for name in ('AT_AWP', 'trades_AWP'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'utils_awp.py').write_text(ADVERSARY)
  return tmp_path


@pytest.fixture
def sides(monkeypatch):
  """The modules of both sides, with PyTorch."""
  pytest.importorskip('torch')
  monkeypatch.syspath_prepend(str(FOLDER))
  ours, rivals, steps = (importlib.import_module(name) for name in (
      'benchmarks.compare.ours', 'benchmarks.compare.rivals',
      'torch_train_step'))
  yield ours, rivals, steps


def tiny(task):
  """A case, its float64 state, images, starts, labels and PyTorch network."""
  import torch
  import torch_preact_resnet

  from benchmarks.compare import ours

  case = Case(task, 2, 4, 'float32', 8, num_steps=2)
  state = ours.make_state(case)
  model = torch_preact_resnet.load(traverse_util.flatten_dict({
      name: jax.tree.map(np.asarray, getattr(state, name))
      for name in ('params', 'batch_stats')}, sep='/')).double()
  x = np.random.default_rng(0).uniform(size=(4, 8, 8, 3))
  start = np.clip(x + np.random.default_rng(1).uniform(
      -0.01, 0.01, x.shape), 0, 1)
  y = np.array([0, 3, 9, 3])
  wide = jax.tree.map(
      lambda leaf: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(
          jnp.asarray(leaf).dtype, jnp.floating) else leaf, state)
  tensors = [torch.tensor(a.transpose(0, 3, 1, 2).copy()) for a in (x, start)]
  return case, wide, (x, start, y), model, (*tensors, torch.tensor(y))


@pytest.mark.torch
@pytest.mark.parametrize('task', cases.TRAINING)
@pytest.mark.parametrize('rival', ['eager', 'tuned', 'released'])
def test_training_steps_agree(sides, monkeypatch, released, task, rival):
  """From the same weights and start: the same loss and parameters."""
  ours, rivals, steps = sides
  with jax.enable_x64(True):
    case, state, (x, start, y), model, (tx, tstart, ty) = tiny(task)
    after, metrics = jax.jit(ours.training_step(
        case, 'perturbed', jnp.asarray(start)))(state, x, y)
    monkeypatch.setattr(steps, 'start', lambda x, method: tstart)
    adversary = None
    if rival == 'released':
      adversary = rivals.released_adversary(released, case, tx, ty)
    loss = steps.make_step(
        'eager' if rival == 'released' else rival, model, tx, ty,
        steps.Method(*case.setting), 'float32', adversary)()
    np.testing.assert_allclose(metrics.loss, loss.numpy(), rtol=1e-9)
    moved = traverse_util.flatten_dict(after.params, sep='/')
    before = traverse_util.flatten_dict(state.params, sep='/')
    found = dict(model.named_parameters())
    assert len(found) == len(moved)
    for path, value in moved.items():
      name = re.sub(r'^(layer\d)_', r'\1.', path.replace('/', '.')).replace(
          '.shortcut.', '.shortcut.0.')
      name = re.sub(r'(kernel|scale)$', 'weight', name)
      theirs = found[name].detach().numpy()
      theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs.T
      assert np.abs(value - before[path]).max() > 1e-6, name
      np.testing.assert_allclose(
          value, theirs, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize('variant', ['eager', 'tuned'])
def test_evaluations_agree(sides, monkeypatch, variant):
  """The number classified correctly at x, and at x and x'."""
  ours, rivals, steps = sides
  with jax.enable_x64(True):
    case, state, (x, start, _), model, (tx, tstart, _) = tiny('pgd-20')
    # At the model's own predictions there is something to break.
    y = np.array(state.apply_fn(
        {'params': state.params, 'batch_stats': state.batch_stats}, x,
        train=False).argmax(-1))
    y[0] = (y[0] + 1) % 10
    found = jax.jit(ours.evaluation(case, jnp.asarray(start)))(state, x, y)
    monkeypatch.setattr(steps, 'start', lambda x, method: tstart)
    natural, robust = rivals.evaluation(
        variant, model, tx, steps.torch.tensor(y),
        steps.Method(*case.setting), 'float32')()
    assert int(natural.sum()) == int(found.natural_correct) == 3
    assert int((natural & robust).sum()) == int(found.robust_correct)


@pytest.mark.torch
def test_tuned_attack_is_ours(sides, monkeypatch):
  """The adversarial images themselves, in eval mode."""
  _, _, steps = sides
  from awp_jax import objectives
  from awp_jax.attacks import pgd
  from benchmarks.compare import ours

  with jax.enable_x64(True):
    case, state, (x, start, y), model, (tx, tstart, ty) = tiny('pgd-20')
    monkeypatch.setattr(steps, 'start', lambda x, method: tstart)

    def loss_fn(images):
      return objectives.cross_entropy(state.apply_fn(
          {'params': state.params, 'batch_stats': state.batch_stats}, images,
          train=False), y)

    wanted = jax.jit(lambda: pgd.pgd(
        jax.random.key(0), loss_fn, jnp.asarray(x), ours.THREAT,
        step_size=2 / 255, num_steps=2, start=jnp.asarray(start)))()
    found = steps.tuned_attack(
        model.requires_grad_(False), tx, ty, steps.Method(*case.setting),
        steps.contextlib.nullcontext)
    np.testing.assert_allclose(
        found.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-12)
    assert np.abs(wanted - start).max() > 0.01


@pytest.mark.torch
@pytest.mark.parametrize('precision', cases.PRECISIONS)
@pytest.mark.parametrize('task', cases.SETTINGS)
def test_rivals_run_in_both_precisions(sides, task, precision):
  _, rivals, _ = sides
  case = Case(task, 1, 2, precision, 8, num_steps=1)
  values = rivals.prepare(case, cases.TUNED, None)[task]()
  assert np.all(np.isfinite(values))


def test_opponents_and_implementations():
  case = Case('at-awp', 64, 32, 'float32')
  assert cases.implementations(case, RIVALS) == [
      'awp_jax', 'torch-tuned', 'torch-compiled', 'awp_jax-reference',
      'released']
  assert cases.implementations(case, RIVALS[:2]) == [
      'awp_jax', 'torch-tuned', 'torch-compiled']
  # The released code has no bfloat16, an evaluation no policy of statistics.
  assert cases.implementations(case._replace(precision='bfloat16'), RIVALS) == [
      'awp_jax', 'torch-tuned', 'torch-compiled']
  assert cases.implementations(case._replace(width=16), RIVALS) == [
      'awp_jax', 'torch-tuned', 'torch-compiled']
  assert cases.implementations(case._replace(task='pgd-20'), RIVALS) == [
      'awp_jax', 'torch-tuned', 'torch-compiled', 'released']
  assert cases.implementations(
      case._replace(task='awp-overhead'), RIVALS) == ['awp_jax']
  assert cases.implementations(
      case._replace(task='autoattack'), [*RIVALS, cases.AUTO_ATTACK]) == [
          'awp_jax', 'auto-attack']
  assert case.setting.num_steps == 10
  assert case._replace(num_steps=3).setting == cases.SETTINGS[
      'at-awp']._replace(num_steps=3)


@pytest.mark.parametrize('task, config', [
    ('at', cifar10_at), ('at-awp', cifar10_awp),
    ('trades-awp', cifar10_trades_awp)])
def test_settings_are_those_of_the_configs(task, config):
  found = config.get_config()
  beta = found.beta if found.objective == 'TRADES' else None
  assert cases.SETTINGS[task] == (
      found.awp.gamma, beta, found.attack.step_size, found.attack.num_steps)


def test_flags_of_bfloat16(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_a=1')
  case = Case('at', 64, 32, 'bfloat16')
  new, old = {'jaxlib': '0.12.0.1'}, {'jaxlib': '0.10.2'}
  assert worker.flags(case, cases.OURS, new) == {'XLA_FLAGS': (
      '--xla_a=1 --xla_cpu_use_onednn=true '
      '--xla_cpu_experimental_onednn_custom_call=true')}
  # XLA ends the process at a flag that it does not know.
  assert not worker.flags(case, cases.OURS, {'jaxlib': '1.0'})
  assert not worker.flags(case, cases.OURS, old)
  assert not worker.flags(case, cases.TUNED, new)
  assert not worker.flags(case._replace(precision='float32'), cases.OURS, new)


def test_machine():
  found = machine.describe(
      'processor : 0\nmodel name : A\nflags : fpu avx2 amx_bf16 x\n\n'
      'processor : 1\nmodel name : B\n')
  assert found['cpu'] == 'A' and found['cores'] >= 1
  assert found['instructions'] == ['avx2', 'amx_bf16']
  assert machine.versions()['jax'] == jax.__version__


def test_timing_takes_turns():
  order = []
  calls = {name: functools.partial(order.append, name) for name in 'ab'}
  found = worker.timed(calls, 3, seconds=60)
  assert order == [*'ababab']
  assert [len(found[name]) for name in 'ab'] == [3, 3]
  assert len(worker.timed(calls, 3, seconds=0)['a']) == 1


def test_measurements_after_the_first_do_not_compile(monkeypatch):
  calls = []
  monkeypatch.setattr(worker, 'prepared', lambda *args: {
      'at': lambda: calls.append(args)})
  case = Case('at', 4, 8, 'float32')
  found = worker.outcomes({
      'case': case._asdict(), 'implementation': 'awp_jax', 'released': '',
      'repeats': 2, 'seconds': 60})
  assert set(next(found)) == {'first_call', 'seconds'} and len(calls) == 3
  assert set(next(found)) == {'seconds'} and len(calls) == 5
  assert calls[0] == (case, 'awp_jax', '')


class FakeWorkers:
  """Starts workers: a tuned step takes twice, a compiled one 1.5 times ours.

  Later rounds are slower, for ours more than for the rivals.
  """

  def __init__(self, fails=()):
    self.fails, self.jobs, self.variables = fails, [], []
    self.started = self.closed = 0

  def __call__(self, python, job, variables):
    assert python == 'py' and job['repeats'] == 3
    self.variables.append(variables)
    self.started += 1
    task, name = job['case']['task'], job['implementation']
    names = ('at', 'at-awp') if task == 'awp-overhead' else (task,)
    scale = {'awp_jax': 1, 'torch-tuned': 2, 'torch-compiled': 1.5}[name]

    def measure():
      self.jobs.append((task, name))
      if name in self.fails:
        raise RuntimeError('InvalidCxxCompiler:\n no compiler')
      turn = self.jobs.count((task, name))
      seconds = scale * (turn if name == 'awp_jax' else (turn + 1) / 2)
      return ({'first_call': 9.0} if turn == 1 else {}) | {'seconds': {
          n: [seconds * (1 + i / 10)] * 3 for i, n in enumerate(names)}}

    def close():
      self.closed += 1

    return types.SimpleNamespace(measure=measure, close=close)


def measured(tmp_path, fake, tasks=('at',), rounds=2):
  """Runs fake workers; the records and which of them are new."""
  turns = runner.Turns(
      {'repeats': 3}, dict.fromkeys(cases.IMPLEMENTATIONS, 'py'),
      {'py': {'python': '3.13', 'jax': '0.12.0', 'torch': '2'}}, tmp_path,
      {'load': 0.25}, fake)
  chosen = runner.selected(
      tasks, [4], ['float32'], lambda width: 8,
      {'image_size': 8, 'num_steps': 1}, 5)
  found = list(zip(*turns.measurements(
      [(case, cases.implementations(case, RIVALS[:2])) for case in chosen],
      rounds, tmp_path / 'sub' / 'times.jsonl'), strict=True))
  assert fake.closed == fake.started
  return found


def test_runner_takes_turns_and_resumes(tmp_path):
  first, again, more = FakeWorkers(), FakeWorkers(), FakeWorkers()
  records, new = measured(tmp_path, first)
  assert first.jobs == 2 * [
      ('at', 'awp_jax'), ('at', 'torch-tuned'), ('at', 'torch-compiled')]
  assert all(new)
  path = tmp_path / 'sub' / 'times.jsonl'
  assert [json.loads(line) for line in path.read_text().splitlines()] == (
      list(records))
  assert first.started == 3
  assert records[0]['versions'] == {'python': '3.13', 'jax': '0.12.0'}
  assert records[1]['versions'] == {'python': '3.13', 'torch': '2'}
  assert first.variables[0]['JAX_COMPILATION_CACHE_DIR']
  # A run that was stopped in the middle of a line.
  lines = path.read_text().splitlines()
  path.write_text('\n'.join(lines[:4]) + '\n' + lines[4][:20])
  found, new = measured(tmp_path, again)
  assert again.jobs == [('at', 'torch-tuned'), ('at', 'torch-compiled')]
  assert new == (False,) * 4 + (True,) * 2
  assert len(runner.read(path)) == len(found) == 6
  measured(tmp_path, more, rounds=3)
  assert len(more.jobs) == 3


def test_runner_records_errors(tmp_path):
  fake = FakeWorkers(fails=('torch-compiled',))
  records, _ = measured(tmp_path, fake)
  # Not tried again in the second round, and the others go on.
  assert [r['implementation'] for r in records] == [
      'awp_jax', 'torch-tuned', 'torch-compiled', 'awp_jax', 'torch-tuned']
  assert records[2]['error'].startswith('InvalidCxxCompiler')
  page = table.markdown(records, ['autoattack: needs --network'])
  assert ('Not measured:\n\n* autoattack: needs --network\n* at 4 8 float32, '
          'PyTorch, compiled: InvalidCxxCompiler: no compiler') in page
  assert 'faster one' not in page
  # A later run tries again.
  later = FakeWorkers()
  records, new = measured(tmp_path, later)
  assert later.jobs == 2 * [('at', 'torch-compiled')] and sum(new) == 2
  assert 'Not measured' not in table.markdown(records)


def test_worker_that_ends(tmp_path):
  """The end of its error output is the reason."""
  started = runner.Worker(
      sys.executable, {'case': Case('at', 4, 8, 'float32')._asdict() | {
          'task': 'nothing'}, 'implementation': 'awp_jax', 'released': ''}, {})
  with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
    started.measure()
  with pytest.raises(RuntimeError, match='exit status 1'):
    started.measure()
  started.close()
  assert runner.versions(sys.executable)['jax'] == jax.__version__


def test_table(tmp_path):
  records, _ = measured(
      tmp_path, FakeWorkers(), ('at', 'awp-overhead'), rounds=2)
  page = table.markdown(records)
  rows = [line for line in page.splitlines() if line.startswith('| at ')]
  assert rows == [
      '| at | 4 | 8 | float32 | awp_jax | 1.500 s | 1.000 s | 2.000 s | 6 | '
      '9.0 s | - |',
      '| at | 4 | 8 | float32 | PyTorch, tuned | 2.500 s | 2.000 s | 3.000 s | '
      '6 | 9.0 s | 1.75 (1.50 - 2.00) |',
      '| at | 4 | 8 | float32 | PyTorch, compiled | 1.875 s | 1.500 s | '
      '2.250 s | 6 | 9.0 s | 1.31 (1.12 - 1.50) |',
      '| at | 4 | 8 | float32 | PyTorch, the faster one | - | - | - | - | - | '
      '1.31 (1.12 - 1.50) |']
  # One step of PGD: 3 / (2 + 3) of the passes.
  assert page.splitlines()[-1] == (
      '| 4 | 8 | float32 | 1.500 s | 1.650 s | 10.0 (10.0 - 10.0) | 6 | 60.0 |')


@pytest.mark.parametrize('arguments, message', [
    (['--rounds=0'], '--rounds must be at least 1, got 0'),
    (['--widths', '0'], 'must be at least 1, got [0]'),
    (['--batch_size=-1'], '--batch_size must be at least 1, got -1'),
    (['--released=nowhere'], 'no such file, nowhere/AT_AWP/utils_awp.py'),
    (['--tasks', 'mart'], "invalid choice: 'mart'")])
def test_bad_arguments(arguments, message, capsys):
  with pytest.raises(SystemExit):
    main.parse(['--output=x.jsonl', *arguments])
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path, capsys):
  """The command measures ours in its own process, and says what it skips."""
  main.main([
      '--tasks', 'at-awp', 'autoattack', '--widths', '1', '--batch_size=2',
      '--image_size=8', '--num_steps=1', '--rounds=1', '--repeats=1',
      '--precisions', 'float32', f'--output={tmp_path / "a.jsonl"}'])
  found, = runner.read(tmp_path / 'a.jsonl')
  assert found['seconds']['at-awp'][0] < found['first_call']
  page = capsys.readouterr().out
  assert '| at-awp | 1 | 2 | float32 | awp_jax |' in page
  assert '* PyTorch, tuned: needs --torch_python' in page
  assert '* autoattack: needs --network' in page


def test_robust_examples_are_reported(tmp_path):
  """Both sides must find the same number."""
  records, _ = measured(tmp_path, FakeWorkers(), ('autoattack',), rounds=2)
  records = [record | {'robust': 3} for record in records]
  page = table.markdown(records)
  assert 'Robust under AutoAttack `fast`: awp_jax 3 of 5.' in page
  assert '| autoattack | - | 5 | float32 | awp_jax | 1.500 s |' in page
  assert '* Load before the run: 0.2' in page


@pytest.mark.slow
def test_autoattack(monkeypatch, tmp_path):
  """The network and the images are those of the file."""
  monkeypatch.syspath_prepend(str(FOLDER))
  rng, path = np.random.default_rng(0), tmp_path / 'network.npz'
  np.savez(path, **{
      'param/0.weight': rng.normal(size=(2, 3, 3, 3)).astype(np.float32),
      'param/0.bias': np.zeros(2, np.float32),
      'param/4.weight': rng.normal(size=(12, 2)).astype(np.float32) / 10,
      # Class 3 wins everywhere: three of the five labels are robust.
      'param/4.bias': 10 * np.eye(12, dtype=np.float32)[3],
      'x': rng.integers(0, 256, (6, 3, 4, 4), np.uint8),
      'y': np.array([3, 0, 3, 3, 1, 3])})
  found = next(worker.outcomes({
      'case': Case('autoattack', 0, 5, 'float32')._asdict(),
      'implementation': cases.OURS, 'network': str(path), 'images': '',
      'auto_attack': ''}))
  assert found['robust'] == 3
  assert 0 < found['seconds']['autoattack'][0] < found['first_call']
