"""The grouped product: rows that are sorted by group, each multiplied by its group's matrix.

`jax.lax.ragged_dot` and its transpose towards the rows do the work of every row once, on TPUs. Its
transpose towards the matrices does the work of every row once per *matrix*: on TPUs and on CPUs,
XLA copies all rows for every group and masks them. With 16 of GLM-4.5-Air's experts on a device
that took 16 times the operations, and arrays of 8 GiB. Therefore that transpose is written out
here. Pallas has it as a kernel (tgmm of megablox), but the kernel does not say over which mesh axes
its result varies, so it cannot be differentiated in `jax.shard_map` while the checks are on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows that are multiplied at once. A tile that several groups share is multiplied once for each of
# them: at most (groups - 1) x this many rows more than there are. A smaller tile reads and writes
# the sums more often.
_TILE = 1024


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """out[i] = x[i] @ weights[g] for the group g that row i belongs to.

    Args:
        x: rows, group by group.
        weights: one matrix per group, of the same dtype.
        sizes: int32, number of rows of every group. The output of rows beyond the last group is
            undefined, and their x does not contribute to the gradient of `weights`.
    """
    return jax.lax.ragged_dot(x, weights, sizes)


def _forward(x: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_product(x, weights, sizes), (x, weights, sizes)


def _backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = residuals
    d_x = jax.lax.ragged_dot(cotangent, jnp.swapaxes(weights, 1, 2), sizes)
    return d_x, _outer_products(x, cotangent, sizes, weights), None


grouped_product.defvjp(_forward, _backward)


def _outer_products(
    x: Float[Array, "M D"],
    y: Float[Array, "M F"],
    sizes: Int[Array, " E"],
    like: Float[Array, "E D F"],
) -> Float[Array, "E D F"]:
    """For every group, the sum of x[i] y[i]^T over its rows, in float32, in the dtype of `like`.

    This is a loop over visits. One visit multiplies the rows that one tile has of one group. There
    are at most tiles + E - 1 visits, because every group after the first shares at most one tile
    with the groups before it.
    """
    rows, groups = x.shape[0], sizes.shape[0]
    tile = min(_TILE, rows)
    max_visits = -(-rows // tile) + groups - 1
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first_tile = starts // tile
    visits = jnp.where(sizes > 0, (ends - 1) // tile - first_tile + 1, 0)
    last_visit = jnp.cumsum(visits)
    num_visits = last_visit[-1]
    # Group and tile of every visit.
    group_of = jnp.repeat(jnp.arange(groups), visits, total_repeat_length=max_visits)
    tile_of = first_tile[group_of] + jnp.arange(max_visits) - (last_visit - visits)[group_of]

    def visit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        step, sums = state
        group, tile_start = group_of[step], tile_of[step] * tile
        # The last tile may end after the rows: it then starts earlier and masks the rows before it.
        begin = jnp.minimum(tile_start, rows - tile)
        row = begin + jnp.arange(tile)
        in_group = (row >= jnp.maximum(starts[group], tile_start)) & (row < ends[group])
        part_x, part_y = (jax.lax.dynamic_slice_in_dim(part, begin, tile) for part in (x, y))
        # Both are masked: rows of no group may hold NaN, and 0 x NaN is not 0.
        part_x, part_y = (jnp.where(in_group[:, None], part, 0) for part in (part_x, part_y))
        product = jnp.einsum("md,mf->df", part_x, part_y, preferred_element_type=jnp.float32)
        return step + 1, sums.at[group].add(product)

    start = (jnp.zeros_like(num_visits), jnp.zeros_like(like, jnp.float32))
    _, sums = jax.lax.while_loop(lambda state: state[0] < num_visits, visit, start)
    return sums.astype(like.dtype)
