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

# For every kind of cache, the names of the dimensions of its arrays.
_NAMES: dict[Any, tuple[DimNames, DimNames]] = {
    KVCache: (BY_HEAD, BY_HEAD),
    LatentCache: (LATENT, LATENT),
    DeltaState: (WINDOW, STATE),
}


def extend(cache: Any, *, copies: int, columns: int) -> Any:
    """Repeats every row `copies` times, side by side, and adds room for `columns` more columns.

    Args:
        cache: the cache of one layer, or a list or tuple of caches; stacked over repeats or not.
        copies: G, completions per prompt.
        columns: columns that will be written later; a state of fixed size needs no room for them.
    """
    kind = type(cache)
    if kind not in _NAMES:
        return kind(extend(part, copies=copies, columns=columns) for part in cache)
    columns = 0 if kind is DeltaState else columns
    return kind(*(_extend(x, n, copies, columns) for x, n in zip(cache, _NAMES[kind], strict=True)))


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """A sharding for every array of a cache, or of a list or tuple of caches."""
    kind = type(cache)
    if kind not in _NAMES:
        return kind(cache_shardings(mesh, part) for part in cache)
    specs = (spec_of(mesh, n, x.shape) for x, n in zip(cache, _NAMES[kind], strict=True))
    return kind(*(NamedSharding(mesh, spec) for spec in specs))


def _extend(x: Array, names: DimNames, copies: int, columns: int) -> Array:
    """The first named dimension holds rows, the next one columns."""
    axis = x.ndim - len(names)
    # With `total_repeat_length` this would be a gather, which collects all rows on every device.
    x = jnp.repeat(x, copies, axis=axis)
    padding = [(0, columns if dimension == axis + 1 else 0) for dimension in range(x.ndim)]
    return constrain(jnp.pad(x, padding), *names)
