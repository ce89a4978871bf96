"""What happens to a KV cache between the prompt and the first decoded token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from occ_jax.models.attention import KVCache
from occ_jax.models.delta_net import DeltaState
from occ_jax.models.latent_attention import LatentCache


def extend(cache: Any, *, copies: int, columns: int) -> Any:
    """Every row `copies` times, neighbours, and room for `columns` more columns.

    Args:
        cache: of one layer, or a list or tuple of caches; stacked over repeats or not.
        copies: G, completions a prompt.
        columns: to be written later. A state of fixed size holds any number and stays as it is.
    """
    match cache:
        case KVCache():
            return KVCache(*(_extend(x, -4, copies, columns) for x in cache))
        case LatentCache():
            return LatentCache(*(_extend(x, -3, copies, columns) for x in cache))
        case DeltaState(window, state):
            return DeltaState(_extend(window, -3, copies, 0), _extend(state, -4, copies, 0))
        case _:
            return type(cache)(extend(part, copies=copies, columns=columns) for part in cache)


def _extend(x: Array, rows: int, copies: int, columns: int) -> Array:
    """`rows` is the axis of the rows counted from the last; that of the columns comes next."""
    axis = x.ndim + rows
    x = jnp.repeat(x, copies, axis=axis, total_repeat_length=copies * x.shape[axis])
    padding = [(0, 0)] * x.ndim
    padding[axis + 1] = (0, columns)
    return jnp.pad(x, padding)
