"""The grouped product: rows that are sorted by group, each times the matrix of its own group.

`jax.lax.ragged_dot` and its transpose towards the rows do the work of the rows once, on TPUs. Its
transpose towards the matrices does it once *a matrix*: XLA, for TPUs as for CPUs, copies all rows
for every group and masks them. With 16 experts of GLM-4.5-Air's on a device that was 16 times the
operations and arrays of 8 GiB, so that transpose is written out here. Pallas has the same as a
kernel (megablox' tgmm), which does not say what mesh axes its result varies over and so cannot be
differentiated inside `jax.shard_map` with its checks on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows that are multiplied at once. A tile that several groups share is multiplied for each, at most
# groups x this many rows beyond the work there is; smaller ones read and write the sums more often.
_TILE = 1024


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
    """out[i] = x[i] @ weights[g] for the group g that row i belongs to.

    Args:
        x: rows, group by group.
        weights: a matrix a group, of the same type.
        sizes: int32, rows of every group; nothing is said of what comes out of rows beyond them,
            and their x has no part in the gradient of `weights`.
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
    """For every group the sum of x[i] y[i]^T over its rows, added up in float32.

    One pass over the tiles that hold rows of a group, in which a tile is visited once for each such
    group: tiles + E - 1 visits at most, as every group after the first shares at most one tile with
    those before it.
    """
    rows, groups = x.shape[0], sizes.shape[0]
    tile = min(_TILE, rows)
    most = -(-rows // tile) + groups - 1
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    first = starts // tile
    visits = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, 0)
    last = jnp.cumsum(visits)
    group = jnp.repeat(jnp.arange(groups), visits, total_repeat_length=most)
    number = first[group] + jnp.arange(most) - (last - visits)[group]

    def visit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        step, sums = state
        mine, place = group[step], number[step] * tile
        # The last tile may reach beyond the rows: it begins earlier and leaves out what is not its.
        begin = jnp.minimum(place, rows - tile)
        row = begin + jnp.arange(tile)
        own = (row >= jnp.maximum(starts[mine], place)) & (row < ends[mine])
        part_x, part_y = (jax.lax.dynamic_slice_in_dim(part, begin, tile) for part in (x, y))
        # Both: rows of no group may hold anything, and 0 times that is not always 0.
        part_x, part_y = (jnp.where(own[:, None], part, 0) for part in (part_x, part_y))
        product = jnp.einsum("md,mf->df", part_x, part_y, preferred_element_type=jnp.float32)
        return step + 1, sums.at[mine].add(product)

    def more(state: tuple[Array, Array]) -> Array:
        # The bound says nothing new; it is what the planner reads (`occ_jax.planning.flops`).
        return (state[0] < last[-1]) & (state[0] < most)

    start = (jnp.zeros_like(last[-1]), jnp.zeros_like(like, jnp.float32))
    return jax.lax.while_loop(more, visit, start)[1].astype(like.dtype)
