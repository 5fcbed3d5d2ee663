"""Records of an attack merge in any order, repeated or of lost examples."""

import numpy as np
import pytest

from awp_jax.evaluation import results


def record(indices, broken, distances, attack='a', number=0):
  indices, broken = np.array(indices), np.array(broken, bool)
  return results.BatchResult(
      attack, indices, broken, 10.0 * indices[broken][:, None] + number,
      np.array(distances, float), results.Anomalies(refused=len(indices)), 1.0,
      'same')


def test_merged_records_are_rising_and_those_of_robust_examples():
  robust = np.array([True] * 5 + [False, True, True])
  merged = results.merge([
      record([6, 7], [True, False], [0.3]),
      record([1, 4, 5], [True, True, True], [0.1, 0.2, 0.9]),
      record([0, 2], [False, True], [0.25])], robust)
  np.testing.assert_array_equal(merged.broken, [1, 2, 4, 6])
  np.testing.assert_array_equal(merged.adversarial[:, 0], [10, 20, 40, 60])
  assert merged.largest_distance == 0.3  # not that of 5, broken before
  assert merged.anomalies == results.Anomalies(refused=7)


def test_the_first_of_two_records_of_an_example_counts():
  merged = results.merge([
      record([3, 1], [True, True], [0.1, 0.2]),
      record([1, 2], [True, True], [0.7, 0.4], number=5)], np.ones(4, bool))
  np.testing.assert_array_equal(merged.broken, [1, 2, 3])
  np.testing.assert_array_equal(merged.adversarial[:, 0], [10, 25, 30])
  assert merged.largest_distance == 0.4


def test_no_records():
  merged = results.merge([], np.zeros(3, bool))
  assert merged.broken.size == 0 and merged.largest_distance == 0


@pytest.mark.parametrize('of, identity, says', [
    ('a', '', 'has no `settings`'), ('b', 'same', 'a record of b'),
    ('a', 'other', "expected identity 'other', got 'same'")])
def test_records_of_another_evaluation_are_refused(of, identity, says):
  with pytest.raises(ValueError, match=says):
    results.check_records([record([1], [True], [0.1], of)], ['a'], identity)


def test_examples_without_a_record_keep_their_order():
  found = results.without_record(np.array([2, 5, 6, 9]), [
      record([6], [False], []), record([1, 2], [False, False], [])])
  np.testing.assert_array_equal(found, [5, 9])
