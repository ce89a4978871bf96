"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Keys and values are linear in one compressed vector a column, which is all the cache holds besides
the rotated part of the key that the heads share. Without a cache they are expanded and attended to
as usual. With one the expansion is folded into the query and the output instead, so that decoding a
token does not expand the whole context:

    q . (W_k l) = (W_k^T q) . l,      sum_s p_s (W_v l_s) = W_v (sum_s p_s l_s)
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from occ_jax.config import LatentAttentionConfig, ModelConfig
from occ_jax.models.attention import BY_HEAD, Columns, attend, write_columns
from occ_jax.models.layers import linear, norm
from occ_jax.models.rope import rotary, rotate
from occ_jax.parallel.sharding import constrain

WHOLE = ("rows", None, None)  # latents on the mesh: all heads read them

# Of the norms of compressed vectors, which in released models is not that of the other norms.
_EPSILON = 1e-6


class LatentCache(NamedTuple):
    """What one layer keeps of a column."""

    latents: Float[Array, "B S X"]  # compressed keys and values, after their norm
    keys: Float[Array, "B S Y"]  # the shared part of the key, after RoPE


class LatentAttention(nnx.Module):
    """H heads, each with its own keys and values out of the shared latent."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        latent = config.latent_attention
        assert latent is not None
        self.config, self.latent = config, latent
        size, heads = config.hidden_size, config.num_heads
        query = heads * (latent.nope_head_dim + latent.rope_head_dim)
        if latent.query_rank:
            self.query_down = linear(config, size, latent.query_rank, rngs)
            self.query_norm = norm(config, latent.query_rank, rngs, epsilon=_EPSILON)
        self.query = linear(config, latent.query_rank or size, query, rngs)
        self.latent_down = linear(config, size, latent.kv_rank, rngs)
        self.latent_norm = norm(config, latent.kv_rank, rngs, epsilon=_EPSILON)
        self.shared_key = linear(config, size, latent.rope_head_dim, rngs)
        self.key = linear(config, latent.kv_rank, heads * latent.nope_head_dim, rngs)
        self.value = linear(config, latent.kv_rank, heads * latent.value_head_dim, rngs)
        self.output = linear(config, heads * latent.value_head_dim, size, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: LatentCache | None
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """As `Attention`; the cache holds latents."""
        config, latent = self.config, self.latent
        how = rotary(config, latent.rope_head_dim)
        query = self.query(self.query_norm(self.query_down(x)) if latent.query_rank else x)
        query = constrain(query.reshape(*x.shape[:2], config.num_heads, -1), *BY_HEAD)
        plain, turned = jnp.split(query, [latent.nope_head_dim], axis=-1)
        turned = rotate(turned, columns.positions, how, interleaved=True)
        shared = self.shared_key(x)[:, :, None]
        shared = rotate(shared, columns.positions, how, interleaved=True)[:, :, 0]
        new = LatentCache(self.latent_norm(self.latent_down(x)), shared)
        if cache is None:
            mixed = self._expanded(plain, turned, new, columns)
        else:
            pairs = zip(cache, new, strict=True)
            new = LatentCache(*(write_columns(*pair, columns.index, WHOLE) for pair in pairs))
            mixed = self._absorbed(plain, turned, new, columns)
        return self.output(mixed.reshape(*x.shape[:2], -1)), new

    def _expanded(
        self, plain: Array, turned: Array, cache: LatentCache, columns: Columns
    ) -> Float[Array, "B T H X"]:
        """Every head's keys and values written out: fewest operations where all columns query."""
        shape = (*cache.latents.shape[:2], self.config.num_heads, -1)
        key = constrain(self.key(cache.latents).reshape(shape), *BY_HEAD)
        value = constrain(self.value(cache.latents).reshape(shape), *BY_HEAD)
        shared = jnp.broadcast_to(
            cache.keys[:, :, None], (*key.shape[:3], self.latent.rope_head_dim)
        )
        return attend(
            self.config,
            jnp.concatenate([plain, turned], axis=-1),
            jnp.concatenate([key, shared], axis=-1),
            value,
            columns,
            softmax_scale(self.config, self.latent),
        )

    def _absorbed(
        self, plain: Array, turned: Array, cache: LatentCache, columns: Columns
    ) -> Float[Array, "B T H X"]:
        """All heads attend to the one latent; fewest bytes where few columns query."""
        by_head = (self.latent.kv_rank, self.config.num_heads, -1)
        dtype = plain.dtype
        key_up = self.key.kernel[...].astype(dtype).reshape(by_head)
        value_up = self.value.kernel[...].astype(dtype).reshape(by_head)
        folded = jnp.einsum("bthc,xhc->bthx", plain, key_up)
        mixed = attend(
            self.config,
            jnp.concatenate([folded, turned], axis=-1),
            jnp.concatenate([cache.latents, cache.keys], axis=-1)[:, :, None].astype(dtype),
            cache.latents[:, :, None].astype(dtype),
            columns,
            softmax_scale(self.config, self.latent),
        )
        return jnp.einsum("bthx,xhc->bthc", mixed, value_up)


def softmax_scale(config: ModelConfig, latent: LatentAttentionConfig) -> float:
    """(head dimension)^-0.5, times YaRN's factor."""
    factor = config.yarn.softmax_factor if config.yarn is not None else 1.0
    return factor * (latent.nope_head_dim + latent.rope_head_dim) ** -0.5
