import doctest

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from occ_jax.rl import advantages, group_advantages, rloo_advantages


def test_group_advantages_match_hand_derivation():
    # (1, 0, 0, 0): mean 1/4; squares 9/16 + 3/16 = 3/4, over G - 1 = 3: variance 1/4, deviation
    # 1/2. A = (3/4)/(1/2), (-1/4)/(1/2). With ddof 0 the first would be 1.7321.
    # (3, 1, 3, 1): mean 2, variance 4/3, A = ±sqrt(3)/2 = ±0.8660254.
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0]])
    expected = [[1.5, -0.5, -0.5, -0.5], [0.8660254, -0.8660254, 0.8660254, -0.8660254]]
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-5)


def test_the_deviation_has_the_published_epsilon_added():
    # (0, 2e-6): deviation sqrt(2) 1e-6, so A = ±1 / (1.4142 + 1) = ±0.41421; ±0.70711 without.
    np.testing.assert_allclose(
        group_advantages(jnp.array([[0.0, 2e-6]])), [[-0.4142136, 0.4142136]], rtol=1e-5
    )


def test_without_normalisation_only_the_mean_is_subtracted():
    rewards = jnp.array([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0]])
    expected = [[0.75, -0.25, -0.25, -0.25], [1.0, -1.0, 1.0, -1.0]]
    np.testing.assert_array_equal(group_advantages(rewards, normalize_std=False), expected)


def test_rloo_compares_with_the_mean_of_the_others():
    # (1, 0, 0, 0): 1 - 0; 0 - 1/3.   (6, 3, 0): 6 - 3/2, 3 - 3, 0 - 9/2.
    np.testing.assert_allclose(
        rloo_advantages(jnp.array([[1.0, 0.0, 0.0, 0.0]])), [[1, -1 / 3, -1 / 3, -1 / 3]], rtol=1e-6
    )
    np.testing.assert_allclose(
        rloo_advantages(jnp.array([[6.0, 3.0, 0.0]])), [[4.5, 0.0, -4.5]], rtol=1e-6
    )


ESTIMATORS = {
    "grpo": group_advantages,
    "dr-grpo": lambda rewards: group_advantages(rewards, normalize_std=False),
    "rloo": rloo_advantages,
}
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


@each_estimator
def test_a_group_of_one_keeps_its_reward(estimator):
    np.testing.assert_array_equal(estimator(jnp.array([[0.7], [-1.0]])), np.float32([[0.7], [-1]]))


@each_estimator
@pytest.mark.parametrize("size", [3, 7])
def test_a_group_of_equal_rewards_gets_exactly_zero(estimator, size):
    # 0.1 has no exact mean for some of these sizes; the last row keeps the zeros from being global.
    constant = np.tile([[0.1], [1.0], [-1.0], [0.3333], [1e6]], size)
    rewards = np.float32(np.concatenate([constant, np.arange(size)[None]]))
    result = np.asarray(estimator(jnp.asarray(rewards)))
    np.testing.assert_array_equal(result[:-1], 0.0)
    assert np.all(result[-1, [0, -1]] != 0)


@each_estimator
def test_groups_do_not_see_each_other(estimator):
    rewards = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    # The second prompt's rewards are another thing altogether in the second batch.
    result = estimator(jnp.asarray(rewards))
    other = estimator(jnp.asarray(rewards * np.float32([[1.0], [100.0]])))
    np.testing.assert_array_equal(result[0], other[0])


@each_estimator
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_any_dtype_comes_out_as_float32(estimator, dtype):
    rewards = jnp.array([[1, 0, 0, 1]])
    result = estimator(rewards.astype(dtype))
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, estimator(rewards.astype(jnp.float32)))


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    st.permutations(range(6)),
    st.integers(-4, 4),
)
def test_advantages_follow_permutations_and_ignore_shifts(values, order, shift):
    rewards = jnp.array([values], jnp.float32)
    for estimator in (group_advantages, rloo_advantages):
        result = estimator(rewards)
        np.testing.assert_allclose(
            estimator(rewards[:, jnp.array(order)] + shift), result[:, jnp.array(order)], atol=1e-5
        )
        np.testing.assert_allclose(result.sum(), 0.0, atol=1e-5)


@each_estimator
@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (2, 0)])
def test_other_shapes_are_refused(estimator, shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"rewards has shape .*allowed: \[P, G\]"):
        estimator(jnp.ones(shape))


def test_examples_in_docstrings():
    assert doctest.testmod(advantages).failed == 0
