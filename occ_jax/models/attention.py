"""Causal grouped-query attention with rotary positions and an explicit KV cache.

Owns the computation between a block's first norm and its residual sum, and `attend`, which latent
attention shares. The caller knows which columns are real tokens (`Columns`) and keeps the cache: it
is an argument and a result.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import ModelConfig
from occ_jax.models import kernels
from occ_jax.models.layers import linear, norm
from occ_jax.models.rope import rotary, rotate
from occ_jax.parallel.sharding import DimNames, constrain

BY_HEAD = ("rows", None, "heads", None)  # dimensions of queries, keys and values


class Columns(NamedTuple):
    """Positions of the T columns of a call, and the S columns that they can read."""

    positions: Int[Array, "B T"]  # int32, position of each column in its own row
    valid: Bool[Array, "B S"]  # which columns hold real tokens
    index: Int[Array, ""] | int  # of the first of the T columns among S; 0 without a cache (S = T)


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer."""

    keys: Float[Array, "B S N C"]
    values: Float[Array, "B S N C"]


def attention_mask(columns: Columns) -> Bool[Array, "B T S"]:
    """True where query column index+t may read key column s: s <= index+t and s holds a token."""
    queries = columns.index + jnp.arange(columns.positions.shape[1])
    causal = jnp.arange(columns.valid.shape[1])[None, :] <= queries[:, None]
    return causal[None] & columns.valid[:, None, :]


def attend(
    config: ModelConfig,
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S N C"],
    value: Float[Array, "B S N X"],
    columns: Columns,
    scale: float | None = None,
) -> Float[Array, "B T H X"]:
    """Softmax attention of T query columns over S columns; `scale` defaults to C^-0.5."""
    size, width = value.shape[-1], query.shape[-1]
    if size < width:
        # The kernels require values as wide as keys.
        value = jnp.pad(value, [(0, 0)] * 3 + [(0, width - size)])
    arrays, factor = (query, key, value), width**-0.5 if scale is None else scale
    # With a cache the queries are few and the scores are not square: no kernel is made for that.
    whole = isinstance(columns.index, int) and query.shape[1] == key.shape[1]
    choice = config.attention_kernel if whole else "plain"
    kernel = kernels.choose_kernel(choice, query.dtype, width)
    if kernel == "splash":
        out = kernels.attend_by_splash(*arrays, columns.valid, factor, BY_HEAD)
    elif kernel == "cudnn":
        out = kernels.attend_by_lengths(*arrays, columns.valid, factor, "cudnn")
    elif whole and 0 < config.attention_columns < query.shape[1]:
        out = kernels.attend_in_pieces(*arrays, columns.valid, factor, config.attention_columns)
    else:
        mask = attention_mask(columns)[:, None]
        out = jax.nn.dot_product_attention(*arrays, mask=mask, scale=scale)
    return out[..., :size]


def write_columns(
    cache: Float[Array, "B S *rest"],
    new: Float[Array, "B T *rest"],
    index: Int[Array, ""] | int,
    names: DimNames,
) -> Float[Array, "B S *rest"]:
    """Writes `new` to columns index ... index+T-1; `names` are those of the cache's dimensions."""
    written = jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), index, axis=1)
    return constrain(written, *names)


class Attention(nnx.Module):
    """Grouped-query attention; H query heads share N key-value heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        size, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads, bias = config.num_kv_heads * config.head_dim, config.qkv_bias
        self.query = linear(config, size, heads, rngs, use_bias=bias)
        self.key = linear(config, size, kv_heads, rngs, use_bias=bias)
        self.value = linear(config, size, kv_heads, rngs, use_bias=bias)
        self.output = linear(config, heads, size, rngs)
        if config.qk_norm:
            self.query_norm = norm(config, config.head_dim, rngs)
            self.key_norm = norm(config, config.head_dim, rngs)
        if config.attention_gate:
            self.gate = linear(config, size, heads, rngs, use_bias=bias)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: KVCache | None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends over `x`, or writes `x` into the cache at `index` and attends over the cache."""
        config = self.config
        shape = (*x.shape[:2], -1, config.head_dim)
        query, key, value = (
            constrain(part(x).reshape(shape), *BY_HEAD)
            for part in (self.query, self.key, self.value)
        )
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        rope = rotary(config, int(config.head_dim * config.rope_fraction))
        query = rotate(query, columns.positions, rope)
        new = KVCache(rotate(key, columns.positions, rope), value)
        if cache is not None:
            pairs = zip(cache, new, strict=True)
            new = KVCache(*(write_columns(*pair, columns.index, BY_HEAD) for pair in pairs))
        mixed = attend(config, query, new.keys, new.values, columns).reshape(*x.shape[:2], -1)
        if config.attention_gate:
            mixed = mixed * jax.nn.sigmoid(self.gate(x))
        return self.output(mixed), new
