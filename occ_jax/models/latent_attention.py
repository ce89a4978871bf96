"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are linear functions of one compressed vector per column, the latent. The cache
holds the latents, and the rotated part of the key that all heads share. Without a cache, keys and
values are expanded for every head and attention is as usual. With a cache, the expansion is folded
into the query and the output, so that decoding a token does not expand the whole context:

    q · (W_k l) = (W_kᵀ q) · l,      Σ_s p_s (W_v l_s) = W_v (Σ_s p_s l_s)
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from occ_jax.config import ModelConfig
from occ_jax.models.attention import BY_HEAD, Columns, attend, write_columns
from occ_jax.models.layers import linear, norm
from occ_jax.models.rope import rotary, rotate
from occ_jax.parallel.sharding import constrain

LATENT = ("rows", None, None)  # dimensions of the cache: not split by head, as all heads read it

# Epsilon of the norms of compressed vectors; in released models it differs from the other norms'.
_LATENT_NORM_EPSILON = 1e-6


class LatentCache(NamedTuple):
    """The columns that one layer remembers."""

    latents: Float[Array, "B S X"]  # compressed keys and values, after their norm
    keys: Float[Array, "B S Y"]  # the shared part of the key, after RoPE


class LatentAttention(nnx.Module):
    """H heads; each expands the shared latent to its own keys and values."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        latent = config.latent_attention
        assert latent is not None
        self.config, self.latent = config, latent
        size, heads = config.hidden_size, config.num_heads
        query = heads * (latent.nope_head_dim + latent.rope_head_dim)
        if latent.query_rank:
            self.query_down = linear(config, size, latent.query_rank, rngs)
            self.query_norm = norm(config, latent.query_rank, rngs, epsilon=_LATENT_NORM_EPSILON)
        self.query = linear(config, latent.query_rank or size, query, rngs)
        self.latent_down = linear(config, size, latent.kv_rank, rngs)
        self.latent_norm = norm(config, latent.kv_rank, rngs, epsilon=_LATENT_NORM_EPSILON)
        self.shared_key = linear(config, size, latent.rope_head_dim, rngs)
        self.key = linear(config, latent.kv_rank, heads * latent.nope_head_dim, rngs)
        self.value = linear(config, latent.kv_rank, heads * latent.value_head_dim, rngs)
        self.output = linear(config, heads * latent.value_head_dim, size, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: LatentCache | None
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """As `Attention`, with a cache of latents."""
        config, latent = self.config, self.latent
        rope = rotary(config, latent.rope_head_dim)
        query = self.query(self.query_norm(self.query_down(x)) if latent.query_rank else x)
        query = constrain(query.reshape(*x.shape[:2], config.num_heads, -1), *BY_HEAD)
        plain, rotated = jnp.split(query, [latent.nope_head_dim], axis=-1)
        rotated = rotate(rotated, columns.positions, rope, interleaved=True)
        shared = self.shared_key(x)[:, :, None]
        shared = rotate(shared, columns.positions, rope, interleaved=True)[:, :, 0]
        new = LatentCache(self.latent_norm(self.latent_down(x)), shared)
        if cache is None:
            mixed = self._expanded(plain, rotated, new, columns)
        else:
            pairs = zip(cache, new, strict=True)
            new = LatentCache(*(write_columns(*pair, columns.index, LATENT) for pair in pairs))
            mixed = self._absorbed(plain, rotated, new, columns)
        return self.output(mixed.reshape(*x.shape[:2], -1)), new

    def _expanded(
        self, plain: Array, rotated: Array, cache: LatentCache, columns: Columns
    ) -> Float[Array, "B T H X"]:
        """Expands keys and values for every head: fewest operations if every column is a query."""
        shape = (*cache.latents.shape[:2], self.config.num_heads, -1)
        key = constrain(self.key(cache.latents).reshape(shape), *BY_HEAD)
        value = constrain(self.value(cache.latents).reshape(shape), *BY_HEAD)
        shared = jnp.broadcast_to(cache.keys[:, :, None], (*key.shape[:3], cache.keys.shape[-1]))
        key = jnp.concatenate([key, shared], axis=-1)
        return self._attend(plain, rotated, key, value, columns)

    def _absorbed(
        self, plain: Array, rotated: Array, cache: LatentCache, columns: Columns
    ) -> Float[Array, "B T H X"]:
        """All heads attend to the same latents: fewest bytes read if few columns are queries."""
        by_head, dtype = (self.latent.kv_rank, self.config.num_heads, -1), plain.dtype
        key_up = self.key.kernel[...].astype(dtype).reshape(by_head)
        value_up = self.value.kernel[...].astype(dtype).reshape(by_head)
        folded = jnp.einsum("bthc,xhc->bthx", plain, key_up)
        key = jnp.concatenate([cache.latents, cache.keys], axis=-1)[:, :, None].astype(dtype)
        value = cache.latents[:, :, None].astype(dtype)
        mixed = self._attend(folded, rotated, key, value, columns)
        return jnp.einsum("bthx,xhc->bthc", mixed, value_up)

    def _attend(
        self, plain: Array, rotated: Array, key: Array, value: Array, columns: Columns
    ) -> Array:
        """Attention with scores times (head dimension)^-0.5 and YaRN's factor."""
        query, yarn = jnp.concatenate([plain, rotated], axis=-1), self.config.yarn
        factor = 1.0 if yarn is None else yarn.softmax_factor
        scale = factor * (self.latent.nope_head_dim + self.latent.rope_head_dim) ** -0.5
        return attend(self.config, query, key, value, columns, scale)
