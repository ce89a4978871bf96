"""One multi-token-prediction module: a projection, a decoder block and three norms.

Its parameters φ_k share nothing with the trunk: embeddings are an argument, and the caller applies
the output head. So the caller alone decides where gradients stop.

Slot i of module k reads the trunk's hidden state at column i (if k > 1: the output of module k-1 at
slot i) and the embedding of the token in column i+k. It predicts the token in column i+k+1.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from occ_jax.config import ModelConfig
from occ_jax.models.attention import Columns
from occ_jax.models.layers import linear, norm
from occ_jax.models.transformer import RESIDUAL, Block, BlockOutput, LayerCache, mtp_kind
from occ_jax.parallel.sharding import constrain


class MTPModule(nnx.Module):
    """g = final_norm(block(projection([norm_e(e), norm_h(h)]))) (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        size = config.hidden_size
        self.embed_norm = norm(config, size, rngs)
        self.hidden_norm = norm(config, size, rngs)
        self.projection = linear(config, 2 * size, size, rngs)
        self.block = Block(config, mtp_kind(config), rngs)
        self.final_norm = norm(config, size, rngs)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embeddings: Float[Array, "B T D"],
        columns: Columns,
        cache: LayerCache | None,
    ) -> BlockOutput:
        """Output after the module's final norm; the output head and the next module read it."""
        pair = [self.embed_norm(embeddings), self.hidden_norm(hidden)]
        if self.config.mtp_concat == "hidden_embed":
            pair.reverse()
        x = constrain(self.projection(jnp.concatenate(pair, axis=-1)), *RESIDUAL)
        out = self.block(x, columns, cache)
        return out._replace(x=self.final_norm(out.x))
