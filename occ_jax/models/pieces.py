"""Functions of long arrays, computed on pieces of one axis so that intermediate results stay small.

Owns how an axis is split into pieces and joined again. The callers choose the axis and the size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

_Result = TypeVar("_Result")


def map_in_pieces(
    function: Callable[..., _Result], arrays: tuple[Any, ...], axis: int, size: int
) -> _Result:
    """`function(*arrays)`, computed on `size` entries of `axis` at a time.

    Each piece is recomputed in the backward pass: if the results of all pieces were kept, splitting
    would save no memory. The last piece is filled up with zeros.

    Args:
        function: treats the entries of `axis` independently; its results have the same axis.
        arrays: pytrees of arrays that all have the axis, with the same length.
        axis: 0 or more.
        size: entries per piece.
    """
    length = jax.tree.leaves(arrays)[0].shape[axis]
    piece = jax.checkpoint(lambda parts: function(*parts))
    results = jax.lax.map(piece, jax.tree.map(lambda x: split(x, axis, size), arrays))
    return jax.tree.map(lambda x: join(x, axis, length), results)


def split(x: Array, axis: int, size: int) -> Array:
    """Splits `axis` into pieces of `size`, zeros at the end: [pieces, ..., size, ...]."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    # The pieces get an axis of their own, so the other axes stay where they are on the mesh.
    x = jnp.pad(x, padding) if padding[axis][1] else x
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def join(pieces: Array, axis: int, length: int) -> Array:
    """Undoes `split`: the first `length` entries of `axis`."""
    x = jnp.moveaxis(pieces, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
