"""The decoder trunk: embedding, pre-norm blocks, final norm, output head.

Its parameters are theta, everything the next-token path uses. The MTP modules borrow its block
(`mtp.py`), its embedding and its head, the last two as arguments from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import ModelConfig
from occ_jax.models.attention import Attention, KVCache, attention_mask
from occ_jax.models.layers import linear, norm

Cache = Sequence[KVCache]  # one KVCache a layer


class TrunkOutput(NamedTuple):
    """What the trunk hands on."""

    hidden: Float[Array, "B T D"]  # after the final norm: what the output head reads
    mtp_input: Float[Array, "B T D"]  # what enters the first MTP module
    cache: list[KVCache]  # keys and values of every layer


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        size, width = config.hidden_size, config.intermediate_size
        self.gate = linear(config, size, width, rngs)
        self.up = linear(config, size, width, rngs)
        self.down = linear(config, width, size, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A pre-norm decoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(config, config.hidden_size, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = norm(config, config.hidden_size, rngs)
        self.mlp = SwiGLU(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"],
        cache: KVCache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        mixed, cache = self.attention(self.attention_norm(x), positions, mask, cache, index)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Trunk(nnx.Module):
    """theta: the whole next-token path."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.final_norm = norm(config, config.hidden_size, rngs)
        if not config.tie_embeddings:
            self.head = linear(config, config.hidden_size, config.vocab_size, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B S"],
        cache: Cache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> TrunkOutput:
        mask = attention_mask(valid, tokens.shape[1], index)
        x = self.embed(tokens)
        layer_caches = [None] * self.config.num_layers if cache is None else cache
        new: list[KVCache] = []
        for layer, layer_cache in zip(self.layers, layer_caches, strict=True):
            x, layer_cache = layer(x, positions, mask, layer_cache, index)
            new.append(layer_cache)
        hidden = self.final_norm(x)
        pre_norm = self.config.mtp_trunk_hidden == "pre_norm"
        return TrunkOutput(hidden, x if pre_norm else hidden, new)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head, in float32."""
        out = self.embed.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        return out.astype(jnp.float32)
