"""Causal grouped-query attention with rotary positions and an explicit KV cache.

Owns what happens between a block's first norm and its residual sum. Which columns are real tokens
is the caller's knowledge (`valid`), as is the cache: it comes in as an argument and goes out as a
result.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import ModelConfig
from occ_jax.models.layers import linear, norm


class KVCache(NamedTuple):
    """Keys (after RoPE) and values of one layer."""

    keys: Float[Array, "B S N C"]
    values: Float[Array, "B S N C"]


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
    """Room for `slots` columns of one layer, two arrays so that both can be donated."""
    shape = (rows, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write_cache(cache: KVCache, new: KVCache, index: Int[Array, ""] | int) -> KVCache:
    """Puts `new` (T columns) at columns index ... index+T-1."""
    return KVCache(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, columns.astype(old.dtype), index, axis=1)
            for old, columns in zip(cache, new, strict=True)
        )
    )


def rotate(
    x: Float[Array, "B T heads C"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T heads C"]:
    """Rotary position embedding, half-split layout: pairs are (i, i + C/2) (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention_mask(
    valid: Bool[Array, "B S"], num_queries: int, index: Int[Array, ""] | int = 0
) -> Bool[Array, "B T S"]:
    """True where query column index+t may read key column s: s <= index+t and s holds a token."""
    queries = index + jnp.arange(num_queries)
    causal = jnp.arange(valid.shape[1])[None, :] <= queries[:, None]
    return causal[None] & valid[:, None, :]


class Attention(nnx.Module):
    """Grouped-query attention; H query heads share N key-value heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config

        size, heads = config.hidden_size, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        self.query = linear(config, size, heads, rngs, use_bias=bias)
        self.key = linear(config, size, kv_heads, rngs, use_bias=bias)
        self.value = linear(config, size, kv_heads, rngs, use_bias=bias)
        self.output = linear(config, heads, size, rngs)
        if config.qk_norm:
            self.query_norm = norm(config, config.head_dim, rngs)
            self.key_norm = norm(config, config.head_dim, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: KVCache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends over the cache's S columns, `x` written at `index` first, or over `x` itself."""
        config = self.config
        rows, columns = x.shape[:2]
        query = self.query(x).reshape(rows, columns, config.num_heads, config.head_dim)
        key = self.key(x).reshape(rows, columns, config.num_kv_heads, config.head_dim)
        value = self.value(x).reshape(rows, columns, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, positions, config.rope_theta)
        new = KVCache(rotate(key, positions, config.rope_theta), value)
        if cache is not None:
            new = write_cache(cache, new, index)
        mixed = jax.nn.dot_product_attention(query, new.keys, new.values, mask=mask[:, None])
        return self.output(mixed.reshape(rows, columns, -1)), new
