"""The estimators of c and G: their definitions, their bias, and numbers by hand."""

import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ_jax.calibration.estimators
from occ_jax.calibration import calibrate_auxiliary, inner_product_statistics, optimal_coefficient
from occ_jax.calibration.estimators import (
    cross_batch_statistics,
    log_prob_statistics,
    released_code_coefficient,
)

NAN = float("nan")
INF = float("inf")


# --- across micro-batches -------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "k"), [(2, 1), (5, 2)])
def test_cross_batch_is_the_mean_over_pairs_of_different_micro_batches(m, k):
    g = jax.random.normal(jax.random.key(0), (m, 4, 3))
    h = jax.random.normal(jax.random.key(1), (k, m, 4, 3))
    within = jax.vmap(inner_product_statistics)(g, list(h)).correlation.sum(0)
    statistics = cross_batch_statistics(
        {"w": g.sum(0)}, [{"w": h[j].sum(0)} for j in range(k)], within, m
    )
    pairs = np.einsum("iab,knab->kin", np.asarray(g, np.float64), np.asarray(h, np.float64))
    expected = [np.mean([p[i, n] for i in range(m) for n in range(m) if i != n]) for p in pairs]
    np.testing.assert_allclose(statistics.correlation, expected, rtol=1e-4, atol=1e-5)
    mean = np.asarray(h, np.float64).mean(1).reshape(k, -1)
    np.testing.assert_allclose(statistics.penalty, mean @ mean.T, rtol=1e-5)
    assert statistics.correlation.dtype == statistics.penalty.dtype == jnp.float32


def test_cross_batch_is_unbiased_where_the_same_batch_is_not():
    # g_m = ĝ + u_m and h_m = ĥ + 0.8 u_m + 0.6 v_m, u and v standard normal: Cov(g, h) = 0.8 I.
    dimension, m, seeds = 10, 4, 4000
    true_g = jnp.linspace(-0.5, 1.0, dimension)
    true_h = jnp.linspace(0.5, -0.25, dimension)

    @jax.vmap
    def measure(key):
        u, v = jax.random.normal(key, (2, m, dimension))
        g, h = true_g + u, true_h + 0.8 * u + 0.6 * v
        within = jax.vmap(inner_product_statistics)(g, h).correlation.sum(0)
        across = cross_batch_statistics(g.sum(0), h.sum(0), within, m)
        same = inner_product_statistics(g.mean(0), h.mean(0))
        return same.correlation[0], across.correlation[0]

    with jax.numpy_rank_promotion("allow"):  # true_g + u
        same, across = map(np.asarray, jax.jit(measure)(jax.random.split(jax.random.key(0), seeds)))
    truth = float(true_g @ true_h)
    error = across.std() / np.sqrt(seeds)
    assert abs(across.mean() - truth) < 4 * error
    error = same.std() / np.sqrt(seeds)
    assert same.mean() - truth > 20 * error
    assert abs(same.mean() - (truth + 0.8 * dimension / m)) < 4 * error  # tr Cov / M


def test_cross_batch_statistics_calibrate_the_mean_gradient():
    g, h = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 1.0], [3.0, 1.0]])
    within = jnp.array([2.0 + 2.0])
    statistics = cross_batch_statistics(g.sum(0), h.sum(0), within, 2)
    # <G, H> = 2 * 4 + 2 * 2 = 12, c = (12 - 4) / 2 = 4, |H / 2|^2 = 4 + 1 = 5
    np.testing.assert_allclose(statistics.correlation, [4.0])
    np.testing.assert_allclose(statistics.penalty, [[5.0]])
    tx = calibrate_auxiliary()
    updates, _ = tx.update(
        g.mean(0), tx.init(g[0]), auxiliary_updates=h.mean(0), statistics=statistics
    )
    np.testing.assert_allclose(updates, [1.0 + 0.8 * 2.0, 1.0 + 0.8 * 1.0], rtol=1e-6)


def test_cross_batch_needs_two_micro_batches_and_one_number_for_each_module():
    g = jnp.ones(3)
    with pytest.raises(ValueError, match="num_micro_batches must be at least 2, got 1"):
        cross_batch_statistics(g, g, jnp.ones(1), 1)
    with pytest.raises(ValueError, match=r"within must be of shape \(1,\)"):
        cross_batch_statistics(g, g, jnp.ones(2), 2)


# --- log-probabilities ----------------------------------------------------------------------------


def test_log_prob_statistics_by_hand():
    delta = jnp.array([[1.0, 2.0, NAN], [-1.0, INF, 3.0]])
    auxiliary = jnp.array(
        [[[2.0, 1.0, NAN], [1.0, -INF, 5.0]], [[0.0, -1.0, 7.0], [2.0, NAN, 11.0]]]
    )
    mask = jnp.array([[1, 1, 0], [1, 0, 0]])
    statistics = log_prob_statistics(delta, auxiliary, mask)
    # counted: δ = (1, 2, -1), δ_1 = (2, 1, 1), δ_2 = (0, -1, 2)
    np.testing.assert_array_equal(statistics.correlation, [2 + 2 - 1, 0 - 2 - 2])
    np.testing.assert_array_equal(statistics.penalty, [[6, 0 - 1 + 2], [0 - 1 + 2, 5]])
    for other in (mask.astype(bool), mask.astype(jnp.float32)):
        again = log_prob_statistics(delta, auxiliary, other)
        np.testing.assert_array_equal(again.correlation, statistics.correlation)
    single = log_prob_statistics(delta, auxiliary[0], mask)
    np.testing.assert_array_equal(single.correlation, [3.0])
    np.testing.assert_array_equal(single.penalty, [[6.0]])


def test_each_module_may_have_its_own_mask():
    delta = jnp.array([[1.0, 2.0, 3.0]])
    auxiliary = jnp.array([[[NAN, 1.0, 2.0]], [[NAN, NAN, 4.0]]])
    mask = jnp.array([[[0, 1, 1]], [[0, 0, 1]]])
    statistics = log_prob_statistics(delta, auxiliary, mask)
    np.testing.assert_array_equal(statistics.correlation, [2.0 + 6.0, 12.0])
    np.testing.assert_array_equal(statistics.penalty, [[1.0 + 4.0, 8.0], [8.0, 16.0]])


def test_a_fully_masked_batch_measures_nothing():
    statistics = log_prob_statistics(
        jnp.full((2, 3), NAN), jnp.full((1, 2, 3), NAN), jnp.zeros((2, 3), bool)
    )
    assert float(optimal_coefficient(statistics)[0]) == 0.0


def test_an_unmasked_nan_is_not_hidden():
    ones = jnp.ones((1, 2))
    statistics = log_prob_statistics(ones.at[0, 1].set(NAN), ones, ones)
    assert np.isnan(statistics.correlation[0])


def test_log_prob_statistics_are_float32_sums_over_bfloat16_tokens():
    ones = jnp.ones((1, 601), jnp.bfloat16)
    statistics = log_prob_statistics(ones, ones, jnp.ones((1, 601), bool))
    assert statistics.correlation.dtype == jnp.float32
    assert float(statistics.correlation[0]) == 601.0


def test_no_gradient_flows_through_a_measurement():
    ones = jnp.ones((1, 2))

    def total(x):
        statistics = log_prob_statistics(x, 2.0 * x, ones)
        released = released_code_coefficient(x, 2.0 * x)
        return statistics.correlation.sum() + statistics.penalty.sum() + released.sum()

    np.testing.assert_array_equal(jax.grad(total)(ones), jnp.zeros((1, 2)))


def test_arrays_that_do_not_line_up_are_refused(monkeypatch):
    # Without the checks of shapes that this test suite puts on every call.
    if "jaxtyping" in sys.modules:
        monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    delta, auxiliary = jnp.ones((2, 3)), jnp.ones((2, 2, 3))
    with pytest.raises(ValueError, match=r"auxiliary_delta must be .* got \(2, 2, 2\)"):
        log_prob_statistics(delta, auxiliary[..., 1:], delta)
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 3\) or \(2, 2, 3\), got"):
        log_prob_statistics(delta, auxiliary, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 3\) or \(2, 2, 3\), got"):
        log_prob_statistics(delta, auxiliary, jnp.ones((3, 2, 3)))


# --- the released code ----------------------------------------------------------------------------


def test_released_coefficient_by_hand():
    delta = jnp.array([[1.0, 2.0], [3.0, 0.0]])
    auxiliary = jnp.array([[2.0, -1.0], [0.5, 4.0]])
    # ratios 0.5, -2, 6, 0: mean 1.125
    coefficient = released_code_coefficient(delta, auxiliary)
    np.testing.assert_allclose(coefficient, [0.1125], rtol=1e-6)
    both = released_code_coefficient(delta, jnp.stack([auxiliary, 2.0 * auxiliary]), 1.0)
    np.testing.assert_allclose(both, [1.125 / 2, 0.5625 / 2], rtol=1e-6)


def test_released_coefficient_counts_padding_and_is_ruled_by_one_small_token():
    delta, auxiliary = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    plain = released_code_coefficient(delta, auxiliary)
    pad = jnp.zeros((1, 2))
    padded = released_code_coefficient(
        jnp.concatenate([delta, pad], 1), jnp.concatenate([auxiliary, pad], 1)
    )
    np.testing.assert_allclose(padded, plain / 2, rtol=1e-6)  # half the positions are padding
    # One token with δ_k = 1e-4 contributes 1 * 1e-4 / 2e-8 = 5000, and next to nothing to the
    # ratio of sums.
    tail = jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 1e-4]])
    np.testing.assert_allclose(released_code_coefficient(*tail), [0.1 * 5001 / 2], rtol=1e-5)
    ratio_of_sums = optimal_coefficient(log_prob_statistics(*tail, jnp.ones((1, 2))))
    np.testing.assert_allclose(ratio_of_sums, [1.0], rtol=1e-3)


def test_the_examples_in_the_documentation_run():
    results = doctest.testmod(occ_jax.calibration.estimators)
    assert results.failed == 0 and results.attempted >= 9
