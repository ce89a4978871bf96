"""Caches of every kind of layer: room for a prompt's completions, and their shardings."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from occ_jax.models.attention import BY_HEAD, KVCache
from occ_jax.models.delta_net import STATE, WINDOW, DeltaState
from occ_jax.models.latent_attention import LATENT, LatentCache
from occ_jax.parallel.sharding import DimNames, constrain, spec_of


def extend(cache: Any, *, copies: int, columns: int) -> Any:
    """Repeats every row `copies` times, side by side, and adds room for `columns` more columns.

    Args:
        cache: the cache of one layer, or a list or tuple of caches; stacked over repeats or not.
        copies: G, completions per prompt.
        columns: columns that will be written later; a state of fixed size needs no room for them.
    """
    match cache:
        case KVCache():
            return KVCache(*(_extend(x, BY_HEAD, copies, columns) for x in cache))
        case LatentCache():
            return LatentCache(*(_extend(x, LATENT, copies, columns) for x in cache))
        case DeltaState(window, state):
            return DeltaState(_extend(window, WINDOW, copies, 0), _extend(state, STATE, copies, 0))
        case _:
            return type(cache)(extend(part, copies=copies, columns=columns) for part in cache)


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """A sharding for every array of a cache, or of a list or tuple of caches."""
    match cache:
        case KVCache():
            names = (BY_HEAD, BY_HEAD)
        case LatentCache():
            names = (LATENT, LATENT)
        case DeltaState():
            names = (WINDOW, STATE)
        case _:
            return type(cache)(cache_shardings(mesh, part) for part in cache)
    kind: Any = type(cache)
    return kind(
        *(NamedSharding(mesh, spec_of(mesh, n, x.shape)) for n, x in zip(names, cache, strict=True))
    )


def _extend(x: Array, names: DimNames, copies: int, columns: int) -> Array:
    """The first named dimension holds rows, the next one columns."""
    axis = x.ndim - len(names)
    # With `total_repeat_length` this would be a gather, which collects all rows on every device.
    x = jnp.repeat(x, copies, axis=axis)
    padding = [(0, 0)] * x.ndim
    padding[axis + 1] = (0, columns)
    return constrain(jnp.pad(x, padding), *names)
