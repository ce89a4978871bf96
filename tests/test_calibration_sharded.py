"""Calibration of gradients that are spread over devices: the same λ, and updates that stay put."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from occ_jax.calibration import Statistics, calibrate_auxiliary
from occ_jax.calibration.estimators import log_prob_statistics

SPECS = {"embed": P("x", None), "w": P(None, "y"), "both": P("y", "x"), "scale": P()}


def make_mesh(axis_type):
    assert len(jax.devices()) == 8
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)


def random_tree(seed):
    """Small integers: inner products are exact in float32, in whatever order they are summed."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"embed": (16, 6), "w": (6, 8), "both": (4, 8), "scale": (5,)}
    return {
        name: jax.random.randint(key, shape, -8, 9).astype(jnp.float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def shard(tree, mesh):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}


@pytest.mark.parametrize(
    ("axis_type", "k", "jitted"),
    [
        (AxisType.Auto, 1, True),
        (AxisType.Auto, 2, True),
        (AxisType.Explicit, 1, True),
        (AxisType.Explicit, 2, True),
        (AxisType.Explicit, 2, False),
    ],
)
def test_eight_devices_find_the_coefficient_of_one(axis_type, k, jitted):
    tx = calibrate_auxiliary(decay=0.9, num_auxiliary=k)
    g, h = random_tree(0), [random_tree(seed) for seed in range(1, 1 + k)]
    expected, expected_state = tx.update(g, tx.init(g), auxiliary_updates=h)

    mesh = make_mesh(axis_type)
    sharded_g, sharded_h = shard(g, mesh), [shard(x, mesh) for x in h]
    update = jax.jit(tx.update) if jitted else tx.update
    with jax.set_mesh(mesh):
        state = tx.init(sharded_g)
        updates, state = update(sharded_g, state, auxiliary_updates=sharded_h)

    np.testing.assert_allclose(state.coefficient, expected_state.coefficient, rtol=1e-6)
    np.testing.assert_array_equal(state.correlation, expected_state.correlation)
    np.testing.assert_array_equal(state.penalty, expected_state.penalty)
    assert int(state.count) == 1
    assert all(x.sharding.is_fully_replicated for x in state)
    for name, actual in updates.items():
        np.testing.assert_allclose(actual, expected[name], rtol=1e-5, atol=1e-6)
        assert actual.sharding.is_equivalent_to(sharded_g[name].sharding, actual.ndim)


def test_a_training_step_keeps_the_sharding_of_its_parameters():
    # Two auxiliary gradients in a box, one of which does not share the embedding, in a whole step.
    tx = optax.chain(
        calibrate_auxiliary(decay=0.5, bounds=(0.0, 0.5), num_auxiliary=2),
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-2),
    )

    @jax.jit
    def step(params, state, g, h):
        updates, state = tx.update(g, state, params, auxiliary_updates=h)
        return optax.apply_updates(params, updates), state

    def train(place):
        params = place(random_tree(100))
        state = jax.jit(tx.init)(params)
        for seed in (0, 10):
            g = place(random_tree(seed))
            h = [place(random_tree(seed + 1)), place(random_tree(seed + 2)) | {"embed": None}]
            # Leaning towards the main gradient, so that the weight found lies inside the box.
            h[1] = jax.tree.map(lambda a, b: a + 3.0 * b, h[1], g | {"embed": None})
            params, state = step(params, state, g, h)
        return params, optax.tree_utils.tree_get(state, "coefficient")

    expected, coefficient = train(lambda tree: tree)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        actual, sharded_coefficient = train(lambda tree: shard(tree, mesh))
    assert 0.0 < float(coefficient[1]) < 0.5
    np.testing.assert_allclose(sharded_coefficient, coefficient, rtol=1e-6)
    for name, x in actual.items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6)
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), x.ndim)


def test_vdot_is_still_why_products_are_summed():
    # Once this no longer raises, the comment in `calibration` on sums of products is out of date.
    mesh = make_mesh(AxisType.Explicit)
    tree = shard(random_tree(0), mesh)
    with jax.set_mesh(mesh), pytest.raises(Exception, match="sharded"):
        optax.tree.vdot(tree, tree)


def test_log_prob_statistics_of_a_sharded_batch():
    delta = jax.random.normal(jax.random.key(0), (8, 6))
    auxiliary = jax.random.normal(jax.random.key(1), (2, 8, 6))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (8, 6))
    expected = log_prob_statistics(delta, auxiliary, mask)
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        actual = jax.jit(log_prob_statistics)(
            jax.device_put(delta, NamedSharding(mesh, P("x", "y"))),
            jax.device_put(auxiliary, NamedSharding(mesh, P(None, "x", "y"))),
            jax.device_put(mask, NamedSharding(mesh, P("x", "y"))),
        )
    assert isinstance(actual, Statistics)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        assert x.sharding.is_fully_replicated
