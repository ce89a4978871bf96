"""The grouped product against its definition, gradients included, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from occ_jax.models import grouped
from occ_jax.models.grouped import grouped_product
from occ_jax.planning.flops import count_flops

D, F = 3, 5


def by_definition(x, weights, sizes):
    """Row by row in NumPy; rows of no group give 0."""
    out, start = np.zeros((len(x), weights.shape[2])), 0
    for matrix, size in zip(weights, sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ matrix
        start += size
    return out


def gradients_by_definition(x, weights, sizes, cotangent):
    d_x, d_weights, start = np.zeros_like(x), np.zeros_like(weights), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        d_x[rows] = cotangent[rows] @ weights[group].T
        d_weights[group] = x[rows].T @ cotangent[rows]
        start += size
    return d_x, d_weights


# Empty groups first, last and in between, groups within a tile and over several, rows to spare.
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    spare=st.integers(0, 9),
    tile=st.integers(1, 8),
)
def test_value_and_gradients_by_definition(sizes, spare, tile):
    rows, owed = sum(sizes) + spare, sum(sizes)
    if rows == 0:
        return
    keys = jax.random.split(jax.random.key(rows + tile), 3)
    x = jax.random.normal(keys[0], (rows, D))
    weights = jax.random.normal(keys[1], (len(sizes), D, F))
    cotangent = jax.random.normal(keys[2], (rows, F)).at[owed:].set(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_TILE", tile)
        counts = jnp.array(sizes, jnp.int32)
        out, pull = jax.vjp(lambda x, w: grouped_product(x, w, counts), x, weights)
        d_x, d_weights = pull(cotangent)
    arrays = [np.asarray(part, np.float64) for part in (x, weights)]
    close(out[:owed], by_definition(*arrays, sizes)[:owed])
    wanted_x, wanted_weights = gradients_by_definition(
        *arrays, sizes, np.asarray(cotangent, np.float64)
    )
    close(d_x[:owed], wanted_x[:owed])
    close(d_weights, wanted_weights)


def test_rows_of_no_group_may_hold_anything():
    sizes = jnp.array([2, 0, 3], jnp.int32)
    x = jnp.ones((8, D)).at[5:].set(jnp.nan)
    cotangent = jnp.ones((8, F)).at[5:].set(jnp.inf)
    weights = jnp.ones((3, D, F))
    _, pull = jax.vjp(lambda w: grouped_product(x, w, sizes), weights)
    np.testing.assert_array_equal(
        pull(cotangent)[0], np.broadcast_to([[[2.0]], [[0.0]], [[3.0]]], (3, D, F))
    )


def test_sums_are_float32_whatever_the_rows_are():
    """1 + 256 terms of 2^-9 are 1.5: in bfloat16 each would be lost."""
    x = jnp.full((257, 1), 2.0**-9, jnp.bfloat16).at[0].set(1.0)
    weights, sizes = jnp.ones((1, 1, 1), jnp.bfloat16), jnp.array([257], jnp.int32)
    _, pull = jax.vjp(lambda w: grouped_product(x, w, sizes), weights)
    (d_weights,) = pull(jnp.ones((257, 1), jnp.bfloat16))
    assert d_weights.dtype == jnp.bfloat16
    assert float(d_weights[0, 0, 0]) == 1.5


def test_operations_are_those_of_the_rows():
    """Forward and towards the rows once; towards the matrices at most E - 1 tiles more."""
    rows, groups, wide = 16 * grouped._TILE, 4, 8
    x, weights = jnp.ones((rows, wide)), jnp.ones((groups, wide, wide))
    sizes = jnp.full(groups, rows // groups, jnp.int32)

    def both(x, weights):
        out, pull = jax.vjp(lambda x, w: grouped_product(x, w, sizes), x, weights)
        return pull(out)

    once = 2 * rows * wide * wide
    found = count_flops(jax.make_jaxpr(both)(x, weights))
    assert found == once * (2 + (16 + groups - 1) / 16)


@pytest.mark.parametrize(
    ("sizes", "visits"),
    [
        ([4, 4, 4, 4], 4),  # a tile each
        ([2, 4, 4, 6], 7),  # three borders within a tile, each one visit more: tiles + E - 1
        ([3, 0, 0, 0], 1),  # of 16 rows: tiles behind the groups' are not visited
        ([0, 0, 0, 0], 0),
    ],
)
def test_tiles_without_rows_of_a_group_are_not_visited(sizes, visits, monkeypatch):
    counted = []

    def while_loop(more, body, state):
        while more(state):
            counted.append(state)
            state = body(state)
        return state

    monkeypatch.setattr(grouped, "_TILE", 4)
    monkeypatch.setattr(jax.lax, "while_loop", while_loop)
    x, weights = jnp.ones((16, D)), jnp.ones((4, D, F))
    counts = jnp.array(sizes, jnp.int32)
    _, pull = jax.vjp(lambda w: grouped_product(x, w, counts), weights)
    np.testing.assert_array_equal(pull(jnp.ones((16, F)))[0][:, 0, 0], sizes)
    assert len(counted) == visits


def close(actual, wanted):
    scale = max(float(np.abs(wanted).max(initial=0.0)), 1e-30)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-6 * scale)
