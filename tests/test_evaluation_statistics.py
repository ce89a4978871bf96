"""Estimators against the definition they are unbiased for: every subset, every sample, by hand."""

import doctest
import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from occ_jax.evaluation import statistics
from occ_jax.evaluation.statistics import (
    Interval,
    interval,
    majority_at_k,
    mean_of_sets,
    paired,
    pass_at_k,
)

VALUES = {"a": 1.0, "b": 0.0, "c": 0.0, "d": 1.0, "e": 0.5}
answers = st.lists(st.sampled_from([*VALUES, None]), min_size=1, max_size=9)


def scores_of(given_answers):
    return [VALUES.get(answer, 0.0) for answer in given_answers]


# pass@k.


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            subsets = list(itertools.combinations(right, k))
            expected.append(sum(map(any, subsets)) / len(subsets))
        found = pass_at_k(np.arange(n + 1), n, k)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


def test_pass_at_one_is_the_average_and_at_n_whether_any_is_right():
    counts = np.array([0, 1, 5, 16])
    np.testing.assert_allclose(pass_at_k(counts, 16, 1), counts / 16, atol=1e-15)
    np.testing.assert_array_equal(pass_at_k(counts, 16, 16), [0, 1, 1, 1])


@given(n=st.integers(2, 400), data=st.data())
def test_pass_at_k_agrees_with_binomials_and_grows(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n - 1))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    now, later = (float(pass_at_k(np.array([c]), n, x)[0]) for x in (k, k + 1))
    assert now == pytest.approx(float(exact), abs=1e-12)
    assert 0 <= now <= later + 1e-15


@pytest.mark.parametrize(
    ("counts", "n", "k"), [([1], 4, 0), ([1], 4, 5), ([5], 4, 2), ([-1], 4, 2)]
)
def test_pass_at_k_refuses_what_it_cannot_be_asked(counts, n, k):
    with pytest.raises(ValueError, match="allowed"):
        pass_at_k(np.array(counts), n, k)


# maj@k.


def majority_by_enumeration(given_answers, k):
    total = Fraction(0)
    subsets = list(itertools.combinations(given_answers, k))
    for subset in subsets:
        votes = Counter(answer for answer in subset if answer is not None)
        winners = [a for a, count in votes.items() if count == max(votes.values())]
        total += sum((Fraction(VALUES[a]) for a in winners), Fraction(0)) / max(len(winners), 1)
    return float(total / len(subsets))


@given(given_answers=answers, data=st.data())
def test_majority_is_the_mean_over_all_subsets(given_answers, data):
    k = data.draw(st.integers(1, len(given_answers)))
    found = majority_at_k(given_answers, scores_of(given_answers), k)
    assert found == pytest.approx(majority_by_enumeration(given_answers, k), abs=1e-12)


@given(given_answers=answers, data=st.data())
def test_majority_does_not_depend_on_the_order_of_answers(given_answers, data):
    shuffled = data.draw(st.permutations(given_answers))
    k = data.draw(st.integers(1, len(given_answers)))
    first, second = (majority_at_k(a, scores_of(a), k) for a in (given_answers, shuffled))
    assert first == pytest.approx(second, abs=1e-12)


def test_majorities_by_hand():
    assert majority_at_k(["7", "7", "8"], [1, 1, 0], 3) == 1
    assert majority_at_k(["7", "8", "8"], [1, 0, 0], 3) == 0
    assert majority_at_k(["7", "8"], [1, 0], 2) == 0.5, "a tie is shared"
    assert majority_at_k(["7", "8", "9"], [1, 0, 0], 3) == pytest.approx(1 / 3)
    assert majority_at_k(["7", None, None], [1, 0, 0], 3) == 1, "no answer, no vote"
    assert majority_at_k([None, None], [0, 0], 2) == 0
    # Two spellings of the right answer split its votes: the verifier's normalisation decides.
    assert majority_at_k(["1/2", "0.5", "3", "3"], [1, 1, 0, 0], 4) == 0
    # Of three pairs, {7, 7} is won and twice {7, 8} is tied.
    assert majority_at_k(["7", "7", "8"], [1, 1, 0], 2) == pytest.approx(2 / 3)
    # One vote each: as avg@n.
    assert majority_at_k(["7", "7", "8", None], [1, 1, 0, 0], 1) == pytest.approx(1 / 2)


def test_a_verdict_that_was_lost_counts_in_its_answers_mean():
    assert majority_at_k(["7", "7", "8"], [1, 0, 0], 3) == 0.5


def test_majority_of_many_answers_stays_exact():
    # 600 right against 400 wrong: half of them are enough to make sure.
    given_answers, scores = ["7"] * 600 + ["8"] * 400, [1] * 600 + [0] * 400
    assert majority_at_k(given_answers, scores, 500) == pytest.approx(1, abs=1e-9)
    # Of k = 3, two or three right: hypergeometric.
    ways = math.comb(600, 2) * 400 + math.comb(600, 3)
    assert majority_at_k(given_answers, scores, 3) == pytest.approx(ways / math.comb(1000, 3))


def test_majority_refuses_what_it_cannot_be_asked():
    for k in (0, 3):
        with pytest.raises(ValueError, match="allowed: 1 to n=2"):
            majority_at_k(["7", "8"], [1, 0], k)
    with pytest.raises(ValueError, match="2 answers with 1 scores"):
        majority_at_k(["7", "8"], [1], 1)
    with pytest.raises(ValueError, match="up to 1000"):
        majority_at_k(["7"] * 1001, [1] * 1001, 2)


# Intervals.


def test_the_interval_by_hand():
    # std of (0, 0, 1, 1) with one degree off is sqrt(1/3); over sqrt(4) it is 0.288675.
    found = interval(np.array([0.0, 0.0, 1.0, 1.0]))
    assert found.mean == 0.5
    assert found.half_width == pytest.approx(1.959964 * 0.2886751, rel=1e-6)


def test_one_question_gives_no_interval_and_none_no_mean():
    found = interval(np.array([0.25]))
    assert found.mean == 0.25 and math.isnan(found.half_width)
    assert all(map(math.isnan, interval(np.array([]))))
    assert interval(np.array([1.0, 1.0, 1.0])) == Interval(1.0, 0.0)


@pytest.mark.parametrize("population", [(0.0, 1.0), (0.0, 0.25, 1.0)])
@pytest.mark.parametrize("questions", [2, 3, 5])
def test_the_squared_error_is_right_on_average_over_every_sample(population, questions):
    """E[SE^2] = Var(mean), by enumeration of all sets of questions there can be."""
    samples = [np.array(s) for s in itertools.product(population, repeat=questions)]
    squared = [(interval(sample).half_width / 1.959963984540054) ** 2 for sample in samples]
    variance = np.var([sample.mean() for sample in samples])
    assert np.mean(squared) == pytest.approx(variance, rel=1e-12)


@given(
    values=st.lists(st.floats(0, 1), min_size=2, max_size=40),
    shift=st.floats(-2, 2),
    scale=st.floats(0.1, 10),
)
def test_intervals_move_and_stretch_with_their_numbers(values, shift, scale):
    before, after = interval(np.array(values)), interval(scale * np.array(values) + shift)
    assert after.mean == pytest.approx(scale * before.mean + shift, abs=1e-9)
    assert after.half_width == pytest.approx(scale * before.half_width, abs=1e-9)


# Two policies.


def test_paired_differences_by_hand():
    first, second = np.array([0.0, 0.5, 1.0, 0.5]), np.array([0.5, 0.5, 1.0, 0.25])
    found = paired(first, second)
    assert found.difference.mean == pytest.approx(0.0625)
    # Differences 0.5, 0, 0, -0.25: variance (0.4375^2 + 2 · 0.0625^2 + 0.3125^2) / 3.
    spread = math.sqrt((0.4375**2 + 2 * 0.0625**2 + 0.3125**2) / 3)
    assert found.difference.half_width == pytest.approx(1.959964 * spread / 2, rel=1e-6)
    assert (found.better, found.worse, found.equal) == (1, 1, 2)


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=30), gain=st.floats(0.01, 0.5))
def test_a_gain_on_every_question_is_certain(values, gain):
    first = np.array(values)
    found = paired(first, first + gain)
    assert found.difference.mean == pytest.approx(gain)
    assert found.difference.half_width == pytest.approx(0, abs=1e-12)
    assert (found.better, found.worse) == (len(values), 0)


@given(pairs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_the_difference_turns_with_the_order_of_policies(pairs):
    first, second = np.array(pairs).T
    forth, back = paired(first, second), paired(second, first)
    assert forth.difference.mean == pytest.approx(-back.difference.mean, abs=1e-12)
    assert (forth.better, forth.worse, forth.equal) == (back.worse, back.better, back.equal)


def test_paired_needs_the_same_questions():
    with pytest.raises(ValueError, match="2 questions against 3"):
        paired(np.zeros(2), np.zeros(3))


def test_the_mean_of_sets_counts_every_set_alike():
    found = mean_of_sets([Interval(0.2, 0.03), Interval(0.6, 0.04)])
    assert found.mean == pytest.approx(0.4)
    assert found.half_width == pytest.approx(0.025)  # sqrt(0.03² + 0.04²) / 2
    assert all(map(math.isnan, mean_of_sets([])))


def test_examples_in_the_documentation_are_right():
    assert doctest.testmod(statistics).failed == 0
    page = Path(__file__).parent.parent / "docs" / "evaluation.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0 and result.attempted >= 5
