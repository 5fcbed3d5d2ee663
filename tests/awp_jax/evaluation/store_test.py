"""Evaluations that are interrupted and resume from a folder; saved results."""

import json

import jax
import numpy as np
import pytest

import awp_jax
from awp_jax.evaluation import store
from awp_jax.evaluation.engine import driver

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
W = RNG.normal(size=(12, 4)).astype(np.float32)
X = RNG.uniform(0.3, 0.7, (40, 12)).astype(np.float32)
Y = np.argmax(X @ W, axis=1)
Y[:4] = (Y[:4] + 1) % 4  # misclassified
THREAT = awp_jax.ThreatModel('Linf', 0.03)


def logits_fn(x):
  return x @ W


class Interrupted(Exception):
  """Simulates the end of the process."""


def run(folder, *, fn=logits_fn, threat=THREAT, stop_after=None, **options):
  """(result, records of this call)."""
  seen = []

  def progress(record):
    seen.append(record)
    if len(seen) == stop_after:
      raise Interrupted

  try:
    result = awp_jax.auto_attack(
        KEY, fn, X, Y, threat, attacks=('apgd-ce', 'apgd-dlr'), store=folder,
        options=awp_jax.EvalOptions(
            batch_size=8, group_size=8, progress=progress, **options))
  except Interrupted:
    return None, seen
  return result, seen


def files(folder):
  return sorted(path.name for path in folder.glob('*/*'))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return run(tmp_path_factory.mktemp('whole'))


def same(one, two):
  np.testing.assert_array_equal(one.robust, two.robust)
  np.testing.assert_array_equal(one.adversarial, two.adversarial)
  assert [(a.name, a.robust_accuracy, a.broken.tolist(), a.anomalies)
          for a in one.attacks] == [
      (a.name, a.robust_accuracy, a.broken.tolist(), a.anomalies)
      for a in two.attacks]


@pytest.mark.parametrize('stop_after', [1, 4, 6])
def test_an_interrupted_evaluation_resumes(stop_after, whole, tmp_path):
  expected, records = whole
  assert len(records) > 6
  _, seen = run(tmp_path, stop_after=stop_after)
  result, rest = run(tmp_path)
  same(result, expected)
  # The record of the interruption was on disk before it was reported.
  assert len(seen) == stop_after
  assert len(seen) + len(rest) == len(records)
  assert run(tmp_path)[1] == []


def test_a_broken_file_is_attacked_again(whole, tmp_path):
  run(tmp_path)
  for number, damage in enumerate((
      lambda data: data[:len(data) // 2], lambda data: b'',
      lambda data: b'PK' + data[9:])):
    path = sorted(tmp_path.glob('*/0*.npz'))[number]
    path.write_bytes(damage(path.read_bytes()))
  result, seen = run(tmp_path)
  same(result, whole[0])
  assert len(seen) == 3


def test_other_evaluations_share_a_folder(tmp_path):
  """Weights, epsilon: nothing of the one is taken for the other."""
  _, first = run(tmp_path)
  assert len({record.identity for record in first}) == 1
  other = W + np.float32(1e-6)
  for change in ({'fn': lambda x: x @ other},
                 {'threat': awp_jax.ThreatModel('Linf', 0.031)}):
    _, seen = run(tmp_path, **change)
    assert seen and seen[0].identity != first[0].identity
  assert len(list(tmp_path.iterdir())) == 3


def test_a_crash_while_writing_leaves_nothing(tmp_path, monkeypatch):
  def savez(file, **arrays):
    file.write(b'half')
    raise OSError('no space left')

  monkeypatch.setattr(np, 'savez', savez)
  with pytest.raises(OSError, match='no space left'):
    run(tmp_path)
  assert files(tmp_path) == ['about.json']
  monkeypatch.undo()
  result, _ = run(tmp_path)
  assert result is not None


def test_the_folder_describes_itself(tmp_path):
  run(tmp_path / 'new' / 'folder')
  (path,) = (tmp_path / 'new' / 'folder').glob('*/about.json')
  about = json.loads(path.read_text())
  assert about['attacks'] == ['apgd-ce', 'apgd-dlr']
  assert about['epsilon'] == 0.03 and about['num_examples'] == 40
  assert about['identity'].startswith(path.parent.name)


def test_refusals(tmp_path):
  share = awp_jax.Share(0, 1, list)
  with pytest.raises(ValueError, match='store is for one process'):
    run(tmp_path, share=share)
  unknown = awp_jax.pgd_spec('mine', step_size=0.01, num_steps=1)._replace(
      settings=None)
  with pytest.raises(ValueError, match='which mine lacks'):
    awp_jax.auto_attack(
        KEY, logits_fn, X, Y, THREAT, attacks=(unknown,), store=tmp_path)
  assert list(tmp_path.iterdir()) == []
  with pytest.raises(ValueError, match="got ''"):
    run('')
  with pytest.raises(ValueError, match='were both given'):
    awp_jax.auto_attack(
        KEY, logits_fn, X, Y, THREAT, store=tmp_path,
        options=awp_jax.EvalOptions(store=tmp_path))
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError):
    run(tmp_path / 'file')


def test_printed_lines(whole, tmp_path, capsys):
  """Survivors fall to the final number, also after an interruption."""
  expected, records = whole
  run(tmp_path, stop_after=3)
  capsys.readouterr()
  run(tmp_path, verbose=True)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(records) - 3
  survivors = [int(line.split()[3]) for line in lines]
  assert survivors == sorted(survivors, reverse=True)
  assert survivors[-1] == int(expected.robust.sum())
  first = records[0].indices.size + sum(
      record.indices.size for record in records[1:4])
  assert lines[0].startswith(f'apgd-ce: {first} attacked, ')
  assert f'{survivors[0]} of 40 robust, ' in lines[0]


def test_lines_count_records_once():
  shown = store.ProgressPrinter(36, 40)
  record = awp_jax.BatchResult(
      'a', np.arange(8), np.arange(8) < 3, np.zeros((3, 12)), np.zeros(3),
      awp_jax.evaluation.results.Anomalies(), 1.0, '')
  shown.take([record])
  assert shown._robust == 33


def test_saved_examples(whole, tmp_path):
  result, _ = whole
  path = tmp_path / 'examples.npz'
  awp_jax.save_examples(path, result)
  found = awp_jax.load_examples(path)
  np.testing.assert_array_equal(found.adversarial, result.adversarial)
  np.testing.assert_array_equal(found.robust, result.robust)
  assert found.attacks == ('apgd-ce', 'apgd-dlr')
  for number, report in enumerate(result.attacks):
    np.testing.assert_array_equal(
        np.flatnonzero(found.broken_by == number), report.broken)
  np.testing.assert_array_equal(
      found.broken_by == -1, result.robust | ~result.natural)
  # Misclassified where broken.
  wrong = np.argmax(found.adversarial @ W, axis=1) != Y
  np.testing.assert_array_equal(wrong, ~found.robust)


def test_a_path_without_suffix_is_kept(whole, tmp_path):
  awp_jax.save_examples(tmp_path / 'examples', whole[0])
  found = awp_jax.load_examples(str(tmp_path / 'examples'))
  np.testing.assert_array_equal(found.robust, whole[0].robust)


def test_about_adds_keys_only(whole):
  with pytest.raises(ValueError, match='must not have the keys eps'):
    awp_jax.result_to_dict(
        whole[0], THREAT, name='a', dataset='b', about={'eps': 1})


def test_files_of_other_contents(tmp_path):
  path = tmp_path / 'x.npz'
  for write in (lambda: path.write_bytes(b'PK nothing'),
                lambda: np.savez(path, robust=np.ones(3)),
                lambda: path.write_bytes(b''),
                lambda: np.savez(path, robust=np.array([object()]))):
    write()
    with pytest.raises(ValueError, match='is not a file of adversarial'):
      awp_jax.load_examples(path)


def test_no_images_to_save(tmp_path):
  result, _ = run(tmp_path, keep_images=False)
  with pytest.raises(ValueError, match='keep_images=True'):
    awp_jax.save_examples(tmp_path / 'x.npz', result)


def test_summary(whole):
  result, _ = whole
  found = json.loads(json.dumps(awp_jax.result_to_dict(
      result, THREAT, name='linear', dataset='random',
      about={'weights_sha256': 'abc'})))
  assert found['clean_acc'] == f'{100 * 36 / 40:.2f}'
  assert float(found['autoattack_acc']) == round(
      100 * result.robust.mean(), 2)
  assert (found['eps'], found['norm'], found['weights_sha256']) == (
      0.03, 'Linf', 'abc')
  low, high = found['autoattack_acc_interval_95']
  assert low < float(found['autoattack_acc']) < high
  assert sum(attack['num_broken'] for attack in found['attacks']) == (
      36 - int(result.robust.sum()))
  assert found['judged']['matmul_precision'] == 'float32'


def test_the_attacks_of_a_resumed_evaluation_compile_nothing_more(
    whole, tmp_path, monkeypatch):
  """With every record on disk no attack starts."""
  run(tmp_path)
  monkeypatch.setattr(driver, 'Job', None)
  result, _ = run(tmp_path)
  same(result, whole[0])


def _custom(weights, scale):
  @jax.custom_vjp
  def f(x):
    return x @ weights

  f.defvjp(lambda x: (x @ weights, None), lambda _, g: (scale * g @ weights.T,))
  return f


WRAPPERS = {
    'jit': jax.jit, 'checkpoint': jax.checkpoint,
    'checkpoint of jit': lambda f: jax.checkpoint(jax.jit(f)),
    'jit of checkpoint of jit': lambda f: jax.jit(
        jax.checkpoint(jax.jit(f))),
    'cond': lambda f: lambda x: jax.lax.cond(x[0, 0] > -9, f, f, x),
    'map': lambda f: lambda x: jax.lax.map(lambda row: f(row[None])[0], x)}


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_weights_inside_any_program_are_part_of_the_identity(wrap, tmp_path):
  """Records of one model must not pass for those of another."""
  other = W + np.float32(0.25) * np.eye(12, 4, dtype=np.float32)
  identities = set()
  for weights in (W, other, W):
    _, seen = run(tmp_path, fn=wrap(lambda x, w=weights: x @ w))
    identities |= {record.identity for record in seen}
  assert len(identities) == 2
  assert len(list(tmp_path.iterdir())) == 2


def test_a_backward_rule_is_part_of_the_identity(tmp_path):
  for scale in (1.0, -1.0):
    _, seen = run(tmp_path, fn=_custom(W, np.float32(scale)))
    assert seen
  assert len(list(tmp_path.iterdir())) == 2


def test_a_forward_rule_is_part_of_the_identity(tmp_path):
  """As of a straight-through estimator."""
  for scale in (0.5, 1.0):
    @jax.custom_jvp
    def identity(x):
      return x

    identity.defjvp(
        lambda primals, tangents, s=scale: (primals[0], s * tangents[0]))
    _, seen = run(tmp_path, fn=lambda x, f=identity: f(x) @ W,
                  check_model=False)
    assert seen
  assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings('ignore::awp_jax.RobustnessWarning')
def test_a_gradient_that_cannot_be_traced_needs_no_identity(tmp_path):
  @jax.custom_vjp
  def looped(x):
    return jax.lax.while_loop(lambda c: c[1] < 1, lambda c: (c[0], c[1] + 1),
                              (x, 0))[0]

  looped.defvjp(lambda x: (looped(x), x), lambda x, g: (jax.lax.while_loop(
      lambda c: True, lambda c: c, g),))
  images = X.reshape(40, 2, 2, 3)

  def fn(x):
    return jax.lax.while_loop(
        lambda c: c[1] < 1, lambda c: (c[0], c[1] + 1), (looped(x), 0)
    )[0].reshape(len(x), -1) @ W

  result = awp_jax.auto_attack(
      KEY, fn, images, Y, THREAT, store=tmp_path,
      attacks=(awp_jax.square_spec('square', num_queries=5),))
  assert len(result.robust) == 40


@pytest.mark.parametrize('value', [
    [np.ones(3)], lambda a, b: a, jax.random.key(0), object()])
def test_settings_that_cannot_be_compared(value, tmp_path):
  spec = awp_jax.pgd_spec('mine', step_size=0.01, num_steps=1)
  with pytest.raises(ValueError, match=r"settings\['a'\] of attack 'mine'"):
    awp_jax.auto_attack(
        KEY, logits_fn, X, Y, THREAT, store=tmp_path, attacks=(
            spec._replace(settings={**spec.settings, 'a': value}),))


def test_a_model_that_calls_python_has_no_identity(tmp_path):
  def calls(x):
    return jax.pure_callback(
        lambda x: np.asarray(x) @ W, jax.ShapeDtypeStruct((len(x), 4), x.dtype),
        x)

  for options in ({'fn': calls}, {'attack_fn': calls}):
    with pytest.raises(ValueError, match='cannot identify a model that calls'):
      run(tmp_path, **options)
  assert list(tmp_path.iterdir()) == []


def test_foreign_and_repeated_files(whole, tmp_path):
  """Files of other names are left alone, and repeated records count once."""
  run(tmp_path)
  (folder,) = tmp_path.iterdir()
  first = min(folder.glob('0*.npz'))
  (folder / '00099-abc.npz').write_bytes(first.read_bytes())
  (folder / '1x.npz').write_bytes(b'')
  result, seen = run(tmp_path)
  same(result, whole[0])
  assert seen == []
  first.unlink()
  (folder / '00099-abc.npz').unlink()
  assert len(run(tmp_path)[1]) == 1


def test_arrays_among_settings(tmp_path):
  spec = awp_jax.pgd_spec('mine', step_size=0.01, num_steps=1)
  for value in (np.float32(1), np.ones(3), np.zeros(3), jax.numpy.ones(3)):
    awp_jax.auto_attack(
        KEY, logits_fn, X, Y, THREAT, store=tmp_path, attacks=(
            spec._replace(settings={**spec.settings, 'a': value}),))
  assert len(list(tmp_path.iterdir())) == 4
