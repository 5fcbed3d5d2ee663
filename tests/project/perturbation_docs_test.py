"""docs/weight_perturbation.md: examples run, and its table matches the code."""

import doctest
import inspect
import pathlib

import pytest

from awp_jax.perturbation import leaves, methods

PAGE = pathlib.Path(__file__).parents[2] / 'docs/weight_perturbation.md'
LEAVES = {leaves.is_weight: 'weights', leaves.is_any: 'all'}


def passes(method):
  """Forward and backward passes of a perturbed step."""
  count = 1 + (method.num_steps if method.direction.source == 'gradient' else 0)
  shares = (method.direction.source == 'gradient'
            and method.natural_batch == 'same')
  return count + (method.uses_natural and not shares)


def row(name):
  """A method's options as a row of the table."""
  needs = {'mask': leaves.is_weight} if name == 'wt_awp' else {}
  method = methods.make(name, **needs)
  moves = f'{method.num_steps} {method.moves}'
  moves += ', boxed' if method.box else ''
  below = method.examples_below
  return ' | '.join([
      f'| `{name}`', method.direction.name, method.ball.norm,
      method.ball.scale, 'required' if needs else LEAVES[method.mask], moves,
      'all' if below is None else f'loss < {below}',
      f'{method.mix[0]}, {method.mix[1]}', method.natural_batch,
      'w + v' if method.update_at == 'perturbed' else 'w',
      f'{passes(method)} |'])


@pytest.mark.parametrize('name', methods.METHODS)
def test_table_matches_the_code(name):
  assert row(name) in PAGE.read_text().splitlines()


@pytest.mark.parametrize('name', methods.METHODS)
def test_defaults_match_the_code(name):
  line = next(line for line in PAGE.read_text().splitlines()
              if line.startswith(f'| `{name}` |'))
  sizes = line.split('|')[-3]
  for option, parameter in inspect.signature(
      methods.METHODS[name]).parameters.items():
    if f' {option} ' in sizes:
      assert f' {option} {parameter.default:g}' in sizes, option
  assert any(character.isdigit() for character in sizes)


def test_examples_run():
  results = doctest.testfile(str(PAGE), module_relative=False)
  assert results.attempted > 10
  assert results.failed == 0
