"""The optax transformation and the optimum behind it: mathematics, state, and optax's own habits.

Sharded gradients are in `test_calibration_sharded.py`.
"""

import doctest
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import occ_jax.calibration.transform
from occ_jax.calibration import (
    CalibrationState,
    Statistics,
    calibrate_auxiliary,
    fixed_auxiliary,
    inner_product_statistics,
    optimal_coefficient,
)

NAN = float("nan")
INF = float("inf")


def statistics_of(c, penalty):
    return Statistics(jnp.array(c, jnp.float32), jnp.array(penalty, jnp.float32))


# Compiled once for each K, whatever the numbers.
_optimum = jax.jit(optimal_coefficient)


def random_tree(seed, dtype=jnp.float32):
    """Gradients of a small model: a pytree with nesting."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": jax.random.normal(keys[0], (5, 3), dtype),
        "block": {
            "w": jax.random.normal(keys[1], (3, 4), dtype),
            "b": jax.random.normal(keys[2], (4,), dtype),
        },
    }


def flat(tree):
    """One float64 vector: the arithmetic that tests compare with is numpy's own."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def assert_trees_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_trees_close(actual, expected, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


# --- the optimum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("c", "v2", "scale", "eps", "bounds", "expected"),
    [
        (6.0, 4.0, 1.0, 1e-8, None, 1.5),
        (6.0, 4.0, 0.5, 1e-8, None, 0.75),
        (6.0, 4.0, 1.0, 2.0, None, 1.0),  # eps adds to the penalty
        (-6.0, 4.0, 1.0, 1e-8, None, -1.5),  # a harmful direction is turned around
        (-6.0, 4.0, 1.0, 1e-8, (0.0, 1.0), 0.0),
        (6.0, 4.0, 1.0, 1e-8, (0.0, 1.0), 1.0),
        (6.0, 4.0, 1.0, 1e-8, (-INF, 1.25), 1.25),
        (0.0, 0.0, 1.0, 1e-8, None, 0.0),  # nothing measured
    ],
)
def test_one_auxiliary_gradient_has_the_papers_closed_form(c, v2, scale, eps, bounds, expected):
    actual = optimal_coefficient(statistics_of([c], [[v2]]), scale, eps, bounds)
    assert actual.shape == (1,) and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, [expected], rtol=1e-6)


def test_two_auxiliary_gradients_by_hand():
    # 2 a + b = 3 and a + b = 2.5 give a = 0.5, b = 2. With b held at 1.5 the first equation gives
    # a = 0.75, where clipping the unconstrained maximiser would have left 0.5.
    statistics = statistics_of([3.0, 2.5], [[2.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(_optimum(statistics, 1.0), [0.5, 2.0], rtol=1e-5)
    np.testing.assert_allclose(_optimum(statistics, 2.0), [1.0, 4.0], rtol=1e-5)
    boxed = _optimum(statistics, 1.0, bounds=(0.0, 1.5))
    np.testing.assert_allclose(boxed, [0.75, 1.5], rtol=1e-5)
    assert boxed[1] == 1.5
    # (G + I)^-1 c = [[3, 1], [1, 2]]^-1 [3, 2.5]
    np.testing.assert_allclose(_optimum(statistics, eps=1.0), [0.7, 0.9], rtol=1e-5)


def test_modules_of_very_different_size_are_not_taken_for_dependent():
    # Orthogonal, with squared norms ten orders of magnitude apart, both worth following.
    statistics = statistics_of([1e4, 1e-4], [[1e4, 0.0], [0.0, 1e-6]])
    expected = [1.0, 1e-4 / (1e-6 + 1e-8)]
    np.testing.assert_allclose(_optimum(statistics, 1.0), expected, rtol=1e-5)


def test_identical_auxiliary_gradients_share_the_weight():
    statistics = statistics_of([6.0, 6.0], [[4.0, 4.0], [4.0, 4.0]])
    np.testing.assert_allclose(_optimum(statistics, 1.0), [0.75, 0.75], rtol=1e-5)


def test_an_absent_auxiliary_gradient_gets_no_weight_and_does_not_disturb():
    statistics = statistics_of([6.0, 0.0], [[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(_optimum(statistics, 1.0), [1.5, 0.0], rtol=1e-6)


# Small integers: linear dependence among the h_k is common and exact, near-dependence impossible.
_ENTRY = st.integers(-2, 2)
_EDGES = [
    (-INF, INF),
    (0.0, INF),
    (-INF, 0.25),
    (0.0, 1.0),
    (-0.5, 0.5),
    (0.125, 3.0),
    (-2.0, -1.0),
]


@pytest.mark.parametrize("k", [1, 2, 3])
@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_the_optimum_maximises_the_bound(k, data):
    vector = st.lists(_ENTRY, min_size=3, max_size=3)
    g = np.array(data.draw(vector, label="g"), np.float64)
    h = np.array(data.draw(st.lists(vector, min_size=k, max_size=k), label="h"), np.float64)
    lo, hi = data.draw(st.sampled_from(_EDGES), label="bounds")
    scale = data.draw(st.sampled_from([1.0, 0.3]), label="scale")
    c, gram = scale * h @ g, h @ h.T + 1e-8 * np.eye(k)
    statistics = statistics_of(h @ g, h @ h.T)
    found = np.asarray(_optimum(statistics, scale, bounds=(lo, hi)), np.float64)

    def bound(weights):
        return weights @ c - 0.5 * np.einsum("nk,kl,nl->n", weights, gram, weights)

    assert np.all((found >= lo) & (found <= hi))
    rng = np.random.default_rng(0)
    around = found + rng.normal(size=(200, k)) * 10.0 ** rng.uniform(-3, 1, size=(200, 1))
    corners = itertools.product([x for x in (lo, 0.0, 1.0, hi) if math.isfinite(x)], repeat=k)
    rivals = np.clip(np.concatenate([around, np.array(list(corners))]), lo, hi)
    best = bound(found[None])[0]
    assert best >= bound(rivals).max() - 1e-5 * (1.0 + abs(best))

    # Sufficient for a concave function: no slope inside, and at the edges none that points inwards.
    # Weights that differ by √(float32's 1e-7) differ in their bound by 1e-7 and look equally good.
    slope = c - gram @ found
    noise = 5e-4 * (1.0 + np.abs(gram) @ np.abs(found))
    assert np.all((slope >= -noise) | (found <= lo + 5e-4))
    assert np.all((slope <= noise) | (found >= hi - 5e-4))

    if (lo, hi) == (-INF, INF):
        unbounded = np.asarray(_optimum(statistics, scale), np.float64)
        assert bound(unbounded[None])[0] >= best - 1e-5 * (1.0 + abs(best))
        # Of all maximisers that with the least sum of squared lengths: nothing of it lies in the
        # directions along which the update does not change.
        length = np.sqrt(np.diag(gram))
        values, vectors = np.linalg.eigh(gram / np.outer(length, length))
        idle = vectors[:, values < 1e-6]
        np.testing.assert_allclose(idle.T @ (length * unbounded), 0.0, atol=1e-3)


# --- statistics -----------------------------------------------------------------------------------


def test_inner_products_match_numpy():
    g, h1, h2 = (random_tree(seed) for seed in range(3))
    statistics = inner_product_statistics(g, [h1, h2])
    matrix = np.stack([flat(h1), flat(h2)])
    np.testing.assert_allclose(statistics.correlation, matrix @ flat(g), rtol=1e-5)
    np.testing.assert_allclose(statistics.penalty, matrix @ matrix.T, rtol=1e-5)
    single = inner_product_statistics(g, h1)
    assert single.correlation.shape == (1,) and single.penalty.shape == (1, 1)
    np.testing.assert_array_equal(single.correlation[0], statistics.correlation[0])


def test_statistics_are_float32_where_bfloat16_would_lose_count():
    ones = jnp.ones(601, jnp.bfloat16)
    assert float(jnp.vdot(ones, ones)) != 601.0  # what summing in the gradient's dtype gives
    statistics = inner_product_statistics({"w": ones}, {"w": ones})
    assert statistics.correlation.dtype == statistics.penalty.dtype == jnp.float32
    assert float(statistics.correlation[0]) == float(statistics.penalty[0, 0]) == 601.0


def test_bfloat16_updates_are_rounded_once_at_the_end():
    g = random_tree(0, jnp.bfloat16)
    h = [random_tree(1, jnp.bfloat16), random_tree(2, jnp.bfloat16)]
    tx = calibrate_auxiliary(num_auxiliary=2)
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h)
    weights = state.coefficient
    assert weights.dtype == jnp.float32

    def combine(x, y, z):
        wide = (a.astype(jnp.float32) for a in (x, y, z))
        first, second, third = wide
        return (first + weights[0] * second + weights[1] * third).astype(jnp.bfloat16)

    assert_trees_equal(updates, jax.tree.map(combine, g, *h))


def test_symmetric_inner_products_are_computed_once_under_jit():
    h = [jnp.arange(4.0) + i for i in range(2)]
    compiled = jax.jit(inner_product_statistics).lower(jnp.arange(4.0), h).compile()
    reductions = [line for line in compiled.as_text().splitlines() if " reduce(" in line]
    assert len(reductions) == 5  # two for c, three and not four for G


# --- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_update_adds_the_weighted_auxiliary_gradients(k):
    g, h = random_tree(0), [random_tree(seed) for seed in range(1, 1 + k)]
    tx = calibrate_auxiliary(0.5, num_auxiliary=k)
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h)
    matrix = np.stack([flat(x) for x in h])
    weights = 0.5 * np.linalg.solve(matrix @ matrix.T, matrix @ flat(g))
    np.testing.assert_allclose(state.coefficient, weights, rtol=1e-4)
    np.testing.assert_allclose(flat(updates), flat(g) + weights @ matrix, rtol=1e-4, atol=1e-6)
    assert int(state.count) == 1


def test_a_conflicting_gradient_is_turned_around_and_not_when_bounded_below():
    g, h = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-2.0, 1.0])}
    free = calibrate_auxiliary()
    updates, state = free.update(g, free.init(g), auxiliary_updates=h)
    np.testing.assert_allclose(state.coefficient, [-0.4], rtol=1e-6)  # -2 / 5
    np.testing.assert_allclose(updates["w"], [1.8, -0.4], rtol=1e-6)
    floored = calibrate_auxiliary(bounds=(0.0, INF))
    updates, state = floored.update(g, floored.init(g), auxiliary_updates=h)
    assert float(state.coefficient[0]) == 0.0
    assert_trees_equal(updates, g)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: x,
        lambda x, y: {"a": x, "b": y},
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: [(x,), y],
        lambda x, y: ([x, y], {"c": y}),
        lambda x, y: Statistics(x, y),  # any NamedTuple: a tuple to isinstance
    ],
    ids=["array", "dict", "tuple", "list", "list of tuple", "nested", "namedtuple"],
)
def test_one_tree_and_a_sequence_of_trees_are_told_apart(wrap):
    g, h1, h2 = (wrap(jnp.arange(2.0) + i, jnp.arange(3.0) - i) for i in range(3))
    one = inner_product_statistics(g, h1)
    assert one.correlation.shape == (1,)
    np.testing.assert_allclose(one.correlation[0], flat(g) @ flat(h1))
    for sequence in ([h1], (h1,)):
        assert_trees_equal(inner_product_statistics(g, sequence), one)
    for sequence in ([h1, h2], (h1, h2)):
        two = inner_product_statistics(g, sequence)
        np.testing.assert_allclose(two.correlation, [flat(h) @ flat(g) for h in (h1, h2)])


def test_parameters_that_are_not_shared_are_left_alone():
    g, h = random_tree(0), random_tree(1)
    tx = calibrate_auxiliary()
    zeros = {"embed": h["embed"], "block": jax.tree.map(jnp.zeros_like, h["block"])}
    leaf = {"embed": h["embed"], "block": {"w": None, "b": jnp.zeros(4)}}
    subtree = {"embed": h["embed"], "block": None}
    expected, expected_state = tx.update(g, tx.init(g), auxiliary_updates=zeros)
    for auxiliary in (leaf, subtree, [subtree]):
        updates, state = tx.update(g, tx.init(g), auxiliary_updates=auxiliary)
        assert_trees_equal(updates, expected)
        assert_trees_equal(state, expected_state)
        assert updates["block"]["w"] is g["block"]["w"]
    # With two modules each may share other parameters; a None is its own module's only.
    mixed = [subtree, {"embed": None, "block": h["block"]}]
    statistics = inner_product_statistics(g, mixed)
    assert float(statistics.penalty[0, 1]) == 0.0
    np.testing.assert_allclose(statistics.correlation.sum(), flat(g) @ flat(h), rtol=1e-5)
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=mixed)
    np.testing.assert_allclose(
        updates["embed"], g["embed"] + state.coefficient[0] * h["embed"], rtol=1e-6
    )
    np.testing.assert_allclose(
        updates["block"]["b"], g["block"]["b"] + state.coefficient[1] * h["block"]["b"], rtol=1e-6
    )


def test_updates_may_themselves_hold_none():
    g = {"frozen": None, "w": jnp.array([1.0, 2.0])}
    h = {"frozen": None, "w": jnp.array([1.0, 1.0])}
    tx = calibrate_auxiliary()
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h)
    assert updates["frozen"] is None
    np.testing.assert_allclose(state.coefficient, [1.5], rtol=1e-6)
    np.testing.assert_allclose(updates["w"], [2.5, 3.5], rtol=1e-6)


def test_statistics_alone_advance_the_coefficient_for_the_next_update():
    g, h = random_tree(0), random_tree(1)
    tx = calibrate_auxiliary(decay=0.5)
    measured = inner_product_statistics(g, h)
    passed, ahead = tx.update(g, tx.init(g), statistics=measured)
    assert passed is g
    updates, together = tx.update(g, tx.init(g), auxiliary_updates=h)
    assert_trees_equal(ahead, together)
    # A step with one backward pass reads λ first and differentiates L + λ L_aux.
    weight = ahead.coefficient[0]
    assert_trees_close(updates, jax.tree.map(lambda x, y: x + weight * y, g, h), atol=1e-6)
    # Given with the gradients they replace their inner products.
    other = statistics_of([2.0], [[4.0]])
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h, statistics=other)
    np.testing.assert_allclose(state.coefficient, [0.5], rtol=1e-6)
    assert_trees_close(updates, jax.tree.map(lambda x, y: x + 0.5 * y, g, h), atol=1e-6)


def test_steps_without_a_measurement_change_nothing():
    tx = calibrate_auxiliary(decay=0.9)
    state = every_step = tx.init(random_tree(0))
    for step in range(9):
        g, h = random_tree(2 * step), random_tree(2 * step + 1)
        if step % 3 == 0:
            _, state = tx.update(g, state, auxiliary_updates=h)
            _, every_step = tx.update(g, every_step, auxiliary_updates=h)
        else:
            updates, after = tx.update(g, state)
            assert updates is g and after is state
    assert int(state.count) == 3
    assert_trees_equal(state, every_step)


# --- averages over steps --------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_averages_match_a_debiased_ema_in_numpy(decay):
    rng = np.random.default_rng(0)
    tx = calibrate_auxiliary(2.0, decay=decay)
    state = tx.init({})
    update = jax.jit(lambda state, statistics: tx.update({}, state, statistics=statistics)[1])
    biased_c = biased_v2 = 0.0
    for t in range(1, 13):
        c, v2 = rng.normal(), rng.uniform(0.5, 2.0)
        state = update(state, statistics_of([c], [[v2]]))
        biased_c = decay * biased_c + (1 - decay) * c
        biased_v2 = decay * biased_v2 + (1 - decay) * v2
        debias = 1 - decay**t
        # float32 holds 1 - 0.999 to 6e-5 of itself, in both averages alike
        np.testing.assert_allclose(state.correlation, [biased_c / debias], rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(state.penalty, [[biased_v2 / debias]], rtol=2e-4)
        np.testing.assert_allclose(state.coefficient, [2 * biased_c / biased_v2], rtol=2e-4)
        assert int(state.count) == t


def test_without_decay_a_measurement_stands_alone_to_the_last_bit():
    tx = calibrate_auxiliary()
    first, second = statistics_of([1e8], [[3e7]]), statistics_of([0.1], [[0.3]])
    _, state = tx.update({}, tx.init({}), statistics=first)
    _, state = tx.update({}, state, statistics=second)
    assert_trees_equal((state.correlation, state.penalty), tuple(second))
    assert_trees_equal(state.coefficient, optimal_coefficient(second))


@pytest.mark.parametrize("k", [1, 2])
def test_an_empty_measurement_leaves_the_coefficient_where_it_was(k):
    # The log-prob proxy measures c = G = 0 in the first mini-batch after every rollout.
    tx = calibrate_auxiliary(decay=0.9, num_auxiliary=k)
    measured = statistics_of([3.0, 2.5][:k], np.array([[2.0, 1.0], [1.0, 1.0]])[:k, :k])
    _, state = tx.update({}, tx.init({}), statistics=measured)
    before = state.coefficient
    for count in (2, 3, 4):
        empty = statistics_of([0.0] * k, np.zeros((k, k)))
        _, state = tx.update({}, state, statistics=empty)
        assert int(state.count) == count
        np.testing.assert_allclose(state.coefficient, before, rtol=1e-5)


def test_the_coefficient_is_the_ratio_of_the_averages():
    # Nearly nothing was seen at the second step, and its ratio is 100: it hardly counts.
    tx = calibrate_auxiliary(decay=0.5)
    _, state = tx.update({}, tx.init({}), statistics=statistics_of([1.0], [[2.0]]))
    _, state = tx.update({}, state, statistics=statistics_of([1e-4], [[1e-6]]))
    np.testing.assert_allclose(state.coefficient, [0.5], rtol=1e-3)


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("where", ["g", "h", "correlation", "penalty"])
def test_a_measurement_that_is_not_finite_is_as_good_as_none(bad, k, where):
    tx = calibrate_auxiliary(decay=0.9, bounds=(-1.0, 1.0), num_auxiliary=k)
    g, h = random_tree(0), [random_tree(seed) for seed in range(1, 1 + k)]
    _, state = tx.update(g, tx.init(g), auxiliary_updates=h)
    statistics = None
    if where == "g":
        g["block"]["b"] = g["block"]["b"].at[0].set(bad)
    elif where == "h":
        h[-1]["embed"] = h[-1]["embed"].at[0, 0].set(bad)
    elif where == "correlation":
        statistics = statistics_of([0.1] * (k - 1) + [bad], np.eye(k))
    else:
        penalty = np.eye(k)
        penalty[-1, -1] = bad
        statistics = statistics_of([0.1] * k, penalty)
    updates, after = tx.update(g, state, auxiliary_updates=h, statistics=statistics)
    assert_trees_equal(updates, g)
    assert_trees_equal(after, state)


def test_a_coefficient_that_is_not_finite_is_as_good_as_none():
    tx = calibrate_auxiliary(1e30)
    g, h = {"w": jnp.ones(2)}, {"w": jnp.full(2, NAN)}
    state = tx.init(g)
    overflow = statistics_of([1e10], [[1e-10]])
    updates, after = tx.update(g, state, auxiliary_updates=h, statistics=overflow)
    assert_trees_equal(updates, g)
    assert_trees_equal(after, state)


def test_a_measurement_that_is_not_finite_does_not_reach_the_solver():
    tx = calibrate_auxiliary(decay=0.9, num_auxiliary=2)
    with jax.debug_nans(True):  # which an infinity passes, but not what a solver makes of it
        tx.update({}, tx.init({}), statistics=statistics_of([1.0, INF], np.eye(2)))


def test_a_weight_of_zero_keeps_out_what_the_auxiliary_gradient_holds():
    g = {"w": jnp.array([1.0, -0.0])}
    h = [{"w": jnp.array([NAN, INF])}, {"w": jnp.array([2.0, 0.0])}]
    tx = calibrate_auxiliary(bounds=(0.0, 1.0), num_auxiliary=2)
    statistics = statistics_of([-1.0, 0.5], np.eye(2))
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h, statistics=statistics)
    np.testing.assert_allclose(state.coefficient, [0.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(updates["w"], [2.0, 0.0], rtol=1e-6)
    fixed = fixed_auxiliary([0.0, 0.5])
    updates, _ = fixed.update(g, fixed.init(g), auxiliary_updates=h)
    np.testing.assert_allclose(updates["w"], [2.0, 0.0], rtol=1e-6)
    off = fixed_auxiliary(0.0)
    updates, _ = off.update(g, off.init(g), auxiliary_updates=h[0])
    assert_trees_equal(updates, g)
    assert np.signbit(updates["w"][1])  # to the bit, not g + 0


# --- habits of optax ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_jit_agrees_with_eager_and_compiles_once(k):
    tx = calibrate_auxiliary(decay=0.9, bounds=(-2.0, 2.0), num_auxiliary=k)
    traces = []

    def step(g, state, h):
        traces.append(k)
        return tx.update(g, state, g, auxiliary_updates=h, an_argument_of_another_transform=1)

    compiled = jax.jit(step)
    state = tx.init(random_tree(0))
    for seed in range(3):
        g, h = random_tree(10 * seed), [random_tree(10 * seed + 1 + i) for i in range(k)]
        expected = step(g, state, h)
        actual = compiled(g, state, h)
        assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)
        state = actual[1]
    assert len(traces) == 3 + 1  # three eager calls, one trace


def test_an_unknown_number_of_auxiliary_gradients_costs_one_retrace():
    tx = calibrate_auxiliary(decay=0.5)
    traces = []

    @jax.jit
    def step(g, state, h):
        traces.append(len(h))
        return tx.update(g, state, auxiliary_updates=h)

    g, h = random_tree(0), [random_tree(1), random_tree(2)]
    state = tx.init(g)
    assert state.coefficient.shape == (1,)
    for _ in range(3):
        _, state = step(g, state, h)
    assert traces == [2, 2]
    assert state.penalty.shape == (2, 2) and int(state.count) == 3
    with pytest.raises(ValueError, match="num_auxiliary is 2, got 1 auxiliary"):
        tx.update(g, state, auxiliary_updates=h[0])


def test_widening_forgets_what_one_auxiliary_gradient_measured():
    tx = calibrate_auxiliary(decay=0.9)
    measured = statistics_of([3.0, 2.5], [[2.0, 1.0], [1.0, 1.0]])
    _, narrow = tx.update({}, tx.init({}), statistics=statistics_of([9.0], [[1.0]]))
    _, widened = tx.update({}, narrow, statistics=measured)
    _, fresh = tx.update({}, tx.init({}), statistics=measured)
    assert_trees_equal(widened, fresh)


def test_init_needs_no_arrays():
    abstract = {"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}
    for tx, k in ((calibrate_auxiliary(), 1), (calibrate_auxiliary(num_auxiliary=3), 3)):
        shapes = jax.eval_shape(tx.init, abstract)
        concrete = tx.init(abstract)
        assert isinstance(concrete, CalibrationState)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), concrete) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
        assert concrete.coefficient.shape == (k,) and concrete.penalty.shape == (k, k)
    schedule = fixed_auxiliary(optax.linear_schedule(1.0, 0.0, 10), num_auxiliary=2)
    assert jax.eval_shape(schedule.init, abstract).coefficient.shape == (2,)


def test_state_keeps_its_types_under_scan_and_cond():
    tx = calibrate_auxiliary(decay=0.9, bounds=(-1.0, 1.0), num_auxiliary=2)
    g, h = random_tree(0, jnp.bfloat16), [random_tree(1, jnp.bfloat16), random_tree(2)]

    def body(state, measure):
        updates, state = jax.lax.cond(
            measure,
            lambda: tx.update(g, state, auxiliary_updates=h),
            lambda: tx.update(g, state),
        )
        return state, updates["embed"]

    state, updates = jax.lax.scan(body, tx.init(g), jnp.array([True, False, True]))
    assert int(state.count) == 2
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates[1], g["embed"])


@pytest.mark.parametrize(
    "tx", [calibrate_auxiliary(num_auxiliary=2), fixed_auxiliary(0.5, num_auxiliary=2)]
)
def test_the_state_can_be_donated(tx):
    g, h = random_tree(0), [random_tree(1), random_tree(2)]
    step = jax.jit(tx.update, donate_argnums=1)
    _, state = step(g, tx.init(g), auxiliary_updates=h)
    _, state = step(g, state, auxiliary_updates=h)
    assert int(state.count) == 2


@pytest.fixture
def with_float64():
    # Not `jax.enable_x64`, which the oldest JAX that the calibration supports lacks.
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_updates_keep_their_dtype_and_the_state_its_own(dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("with_float64")
    g, h = random_tree(0, dtype), random_tree(1)
    tx = calibrate_auxiliary(decay=0.9, bounds=(0.25, 0.5))
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h)
    assert all(x.dtype == dtype for x in jax.tree.leaves(updates))
    assert [x.dtype for x in state] == [jnp.int32] + [jnp.float32] * 3
    expected = flat(g) + float(state.coefficient[0]) * flat(h)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(flat(updates), expected, rtol=2 * eps, atol=4 * eps)


def test_in_a_chain_it_equals_the_gradients_combined_by_hand():
    params = random_tree(100)
    tail = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    chain = optax.chain(
        calibrate_auxiliary(decay=0.5, bounds=(-1.0, 1.0)),
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2),
    )
    alone = calibrate_auxiliary(decay=0.5, bounds=(-1.0, 1.0))
    state, tail_state, alone_state = chain.init(params), tail.init(params), alone.init(params)
    for step in range(3):
        g, h = random_tree(2 * step), random_tree(2 * step + 1)
        updates, state = chain.update(g, state, params, auxiliary_updates=h)
        _, alone_state = alone.update(g, alone_state, auxiliary_updates=h)
        weight = alone_state.coefficient[0]
        by_hand = jax.tree.map(lambda x, y, weight=weight: x + weight * y, g, h)
        expected, tail_state = tail.update(by_hand, tail_state, params)
        assert_trees_close(updates, expected, rtol=1e-5, atol=1e-8)
        read = optax.tree_utils.tree_get(state, "coefficient")
        assert_trees_equal(read, alone_state.coefficient)


def test_hyperparameters_can_be_injected():
    g, h = random_tree(0), random_tree(1)
    injected = optax.inject_hyperparams(calibrate_auxiliary, static_args=("num_auxiliary",))(
        scale=optax.linear_schedule(1.0, 0.0, 2), decay=0.5, bounds=(-2.0, 2.0), num_auxiliary=1
    )
    plain = calibrate_auxiliary(1.0, decay=0.5, bounds=(-2.0, 2.0))
    update = jax.jit(lambda state: injected.update(g, state, g, auxiliary_updates=h))
    updates, state = update(injected.init(g))
    expected, expected_state = plain.update(g, plain.init(g), auxiliary_updates=h)
    assert_trees_close(updates, expected, atol=1e-6)
    _, state = update(state)
    np.testing.assert_allclose(
        state.inner_state.coefficient, 0.5 * expected_state.coefficient, rtol=1e-5
    )


def test_optax_can_map_over_the_parameters_in_its_state():
    tx = optax.chain(calibrate_auxiliary(), optax.adam(1e-3))
    params = random_tree(0)
    state = tx.init(params)
    doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert_trees_equal(doubled[0], state[0])  # none of it is per parameter


# --- fixed weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficient", "weights"), [(0.25, [0.25, 0.25]), ([0.25, -0.5], [0.25, -0.5])]
)
def test_fixed_weights_are_added(coefficient, weights):
    g, h = random_tree(0), [random_tree(1), random_tree(2)]
    tx = fixed_auxiliary(coefficient)
    updates, state = tx.update(g, tx.init(g), auxiliary_updates=h, statistics="ignored", more=1)
    expected = flat(g) + weights[0] * flat(h[0]) + weights[1] * flat(h[1])
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state.coefficient, jnp.array(weights))


def test_a_schedule_is_read_at_the_number_of_updates_and_is_known_beforehand():
    tx = fixed_auxiliary(optax.linear_schedule(1.0, 0.0, 4))
    g, h = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    state = tx.init(g)
    update = jax.jit(lambda state, h: tx.update(g, state, auxiliary_updates=h))
    for step, weight in enumerate([1.0, 0.75, 0.5, 0.25, 0.0, 0.0]):
        assert int(state.count) == step
        np.testing.assert_allclose(state.coefficient, [weight])
        if step % 2:  # one backward pass: λ was in the loss, the update has nothing to add
            passed, state = tx.update(g, state)
            assert passed is g
        else:
            updates, state = update(state, h)
            np.testing.assert_allclose(updates["w"], [weight])


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"scale": NAN}, "scale must be positive and finite, got nan"),
        ({"scale": INF}, "scale must be positive and finite, got inf"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\), got -0.1"),
        ({"decay": np.float32(2.0)}, r"decay must be in \[0, 1\), got 2.0"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"bounds": (1.0, 1.0)}, "bounds must be .* lo < hi, got"),
        ({"bounds": (1.0, 0.0)}, "bounds must be .* lo < hi, got"),
        ({"bounds": (NAN, 1.0)}, "bounds must be .* lo < hi, got"),
        ({"bounds": (0.0, 1.0, 2.0)}, "bounds must be .* lo < hi, got"),
        ({"num_auxiliary": 0}, "num_auxiliary must be .* ≥ 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate_auxiliary(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coefficient": NAN}, "coefficient must be finite, got nan"),
        ({"coefficient": [0.1, INF]}, "coefficient must be finite"),
        ({"coefficient": []}, "coefficient must be num_auxiliary=None long"),
        ({"coefficient": [0.1], "num_auxiliary": 2}, "coefficient must be num_auxiliary=2 long"),
        ({"coefficient": 0.1, "num_auxiliary": 0}, "num_auxiliary must be .* ≥ 1, got 0"),
    ],
)
def test_fixed_weights_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fixed_auxiliary(**arguments)


def test_auxiliary_gradients_that_do_not_fit_are_named():
    g, h = random_tree(0), random_tree(1)
    tx = calibrate_auxiliary(num_auxiliary=2)
    state = tx.init(g)
    with pytest.raises(ValueError, match="num_auxiliary is 2, got 3 auxiliary gradients"):
        tx.update(g, state, auxiliary_updates=[h, h, h])
    with pytest.raises(ValueError, match="statistics are of 2 auxiliary gradients, got 1"):
        tx.update(g, state, auxiliary_updates=h, statistics=statistics_of([1, 1], np.eye(2)))
    with pytest.raises(ValueError, match=r"a leaf of shape \(3,\) where updates has \(4,\)"):
        tx.update(g, state, auxiliary_updates=[h, h | {"block": {"w": None, "b": jnp.zeros(3)}}])
    for misfit in ([h, {"embed": h["embed"]}], {"embed": h["embed"]}, [], [h, [h]]):
        with pytest.raises(ValueError, match="one pytree with the structure of updates"):
            tx.update(g, state, auxiliary_updates=misfit)
    # a gradient for a parameter that the main loss does not train
    with pytest.raises(ValueError, match="one pytree with the structure of updates"):
        tx.update({"w": None}, state, auxiliary_updates={"w": jnp.ones(2)})
    fixed = fixed_auxiliary([0.1])
    with pytest.raises(ValueError, match="num_auxiliary is 1, got 2 auxiliary gradients"):
        fixed.update(g, fixed.init(g), auxiliary_updates=[h, h])


@pytest.mark.parametrize(
    ("c", "penalty"),
    [(1.0, 1.0), ([1.0], [1.0]), ([1.0, 1.0], [[1.0]]), ([], [[]]), ([[1.0]], [[1.0]])],
)
def test_statistics_of_the_wrong_shape_are_refused(c, penalty):
    tx = calibrate_auxiliary()
    with pytest.raises(ValueError, match=r"correlation of shape \[K\]"):
        tx.update({}, tx.init({}), statistics=statistics_of(c, penalty))
    with pytest.raises(ValueError, match=r"correlation of shape \[K\]"):
        optimal_coefficient(statistics_of(c, penalty))


def test_the_examples_in_the_documentation_run():
    results = doctest.testmod(occ_jax.calibration.transform)
    assert results.failed == 0 and results.attempted > 20
