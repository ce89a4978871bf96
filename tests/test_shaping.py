import doctest

import jaxtyping
import numpy as np
import pytest

from occ_jax.rewards import shaping
from occ_jax.rewards.shaping import informative_groups, overlong_penalty


def test_penalty_is_linear_over_the_buffer():
    # 8192 with a buffer of 4096: free up to 4096; a quarter of the way 5120; half-way 6144.
    lengths = np.array([[0, 1, 4096], [5120, 6144, 8192]])
    penalty = overlong_penalty(lengths, max_tokens=8192, buffer_tokens=4096)
    np.testing.assert_array_equal(penalty, np.float32([[0, 0, 0], [-0.25, -0.5, -1]]))
    assert penalty.dtype == np.float32
    assert not np.signbit(penalty[0]).any()


def test_factor_scales_the_penalty():
    # n = 90 of 100, buffer 20: half of it used, times 3. A factor of 0 switches the penalty off.
    for factor, expected in ((3.0, -1.5), (0.0, 0.0)):
        penalty = overlong_penalty(np.array([90]), max_tokens=100, buffer_tokens=20, factor=factor)
        np.testing.assert_array_equal(penalty, np.float32([expected]))


def test_unsigned_and_scalar_lengths():
    lengths = np.array([0, 100], np.uint32)
    np.testing.assert_array_equal(
        overlong_penalty(lengths, max_tokens=100, buffer_tokens=50), np.float32([0, -1])
    )
    assert overlong_penalty(np.array(75), max_tokens=100, buffer_tokens=50) == np.float32(-0.5)


def test_buffer_may_be_the_whole_length():
    penalty = overlong_penalty(np.array([0, 5, 10]), max_tokens=10, buffer_tokens=10)
    np.testing.assert_array_equal(penalty, np.float32([0, -0.5, -1]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"buffer_tokens": 0}, "buffer_tokens=0; allowed: 1 to max_tokens=100"),
        ({"buffer_tokens": 101}, "buffer_tokens=101; allowed: 1 to max_tokens=100"),
        ({"factor": -1.0}, "factor=-1.0; allowed"),
        ({"factor": float("nan")}, "factor=nan; allowed"),
    ],
)
def test_bad_settings_are_refused(changed, message):
    settings = {"max_tokens": 100, "buffer_tokens": 50, "factor": 1.0} | changed
    with pytest.raises(ValueError, match=message):
        overlong_penalty(np.array([1]), **settings)


def test_lengths_must_be_integers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="lengths has dtype float64; allowed: integers"):
        overlong_penalty(np.array([0.5]), max_tokens=100, buffer_tokens=50)


def test_only_groups_of_mixed_accuracy_are_informative():
    accuracies = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1]])
    expected = [False, False, True, True]
    for dtype in (np.int64, np.float32, np.bool_):
        mask = informative_groups(accuracies.astype(dtype))
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, expected)


def test_equal_fractions_are_not_informative():
    # np.std of these is 1.4e-17, not 0: the rounding of the mean must not pass for a contrast.
    accuracies = np.full((1, 3), 0.1)
    assert np.std(accuracies) > 0
    np.testing.assert_array_equal(informative_groups(accuracies), [False])


def test_length_penalties_do_not_make_a_solved_group_informative():
    accuracies = np.ones((1, 4))
    lengths = np.array([[10, 60, 80, 100]])
    shaped = accuracies + overlong_penalty(lengths, max_tokens=100, buffer_tokens=50)
    assert np.std(shaped) > 0
    np.testing.assert_array_equal(informative_groups(accuracies), [False])


def test_a_group_of_one_is_never_informative():
    np.testing.assert_array_equal(informative_groups(np.array([[0.0], [1.0]])), [False, False])


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (2, 0)])
def test_other_shapes_are_refused(shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"accuracies has shape .*allowed: \[P, G\]"):
        informative_groups(np.ones(shape))


def test_examples_in_docstrings():
    assert doctest.testmod(shaping).failed == 0
