"""The parts of the trunk as pure functions of its parameters: embedding, layers, output head.

The parameters θ of the trunk are all that predicts the next token: {"embed", "layers",
"final_norm", "head"}. "layers" has one dictionary per segment, {0: block, 1: block, ...} for the
layers of its pattern; if the segment has more than one repeat, every leaf has a leading axis of
repeats. `occ_jax.models.model.Model` puts the parts together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from occ_jax.config import ModelConfig
from occ_jax.models.attention import Columns
from occ_jax.models.layers import linear, norm
from occ_jax.models.transformer import (
    RESIDUAL,
    Block,
    LayerCache,
    LayerKind,
    Segment,
    rematerialised,
    segments,
)
from occ_jax.parallel.sharding import constrain, gather_weights
from occ_jax.types import Params

Cache = Sequence[tuple[LayerCache, ...]]
"""For every segment, the caches of the layers of its pattern, stacked like the parameters."""


class EmbeddingAndHead(nnx.Module):
    """The trunk without its layers: token embedding, final norm, output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.final_norm = norm(config, config.hidden_size, rngs)
        if not config.tie_embeddings:
            self.head = linear(config, config.hidden_size, config.vocab_size, rngs)

    def embeddings(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the embedding of every token."""
        table = self.embed.embedding[...].astype(self.config.dtype)
        # The constraint is for the cotangent: every device scatters the gradients of its own tokens
        # before they are summed and sharded as the parameter, not after.
        table = constrain(table, "vocabulary", None)
        return constrain(jnp.take(table, tokens, axis=0), *RESIDUAL)


@functools.cache
def graph(module: Callable[..., nnx.Module], config: ModelConfig, *kind: LayerKind) -> Any:
    """The static half of a module, built without allocating a parameter."""
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, *kind, nnx.Rngs(params=0))))


def init_module(
    module: Callable[..., nnx.Module], config: ModelConfig, key: Key[Array, ""], *kind: LayerKind
) -> Params:
    """The parameters of a module, drawn at random."""
    return nnx.to_pure_dict(nnx.state(module(config, *kind, nnx.Rngs(params=key)), nnx.Param))


def init_trunk(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Random parameters; those of a layer depend on its number, not on how layers are stacked."""
    outer_key, layers_key = jax.random.split(key)

    def init_block(kind: LayerKind, numbers: Int[Array, " repeats"]) -> Params:
        def init_one(number: Int[Array, ""]) -> Params:
            return init_module(Block, config, jax.random.fold_in(layers_key, number), kind)

        return jax.vmap(init_one)(numbers) if len(numbers) > 1 else init_one(numbers[0])

    stacked = {
        index: {
            offset: init_block(
                kind, segment.first + offset + len(segment.pattern) * jnp.arange(segment.repeats)
            )
            for offset, kind in enumerate(segment.pattern)
        }
        for index, segment in enumerate(segments(config))
    }
    return {**init_module(EmbeddingAndHead, config, outer_key), "layers": stacked}


def embedding_and_head(config: ModelConfig, theta: Params) -> EmbeddingAndHead:
    """The trunk without its layers, ready to be called."""
    own = {name: part for name, part in theta.items() if name != "layers"}
    return nnx.merge(graph(EmbeddingAndHead, config), gather_weights(own, config.dtype))


def output_head(config: ModelConfig, theta: Params) -> Float[Array, "D V"]:
    """The matrix of the output head; if it is tied, the transpose of the embedding."""
    outer = embedding_and_head(config, theta)
    return outer.embed.embedding[...].T if config.tie_embeddings else outer.head.kernel[...]


def read_head(
    config: ModelConfig, heads: Float[Array, "P D V"], hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits in float32; the products are summed in float32 for every dtype of the operands.

    Args:
        config: its `dtype` is the dtype of the products.
        heads: P copies of the output head; each is read by B/P neighbouring rows.
        hidden: states after a final norm.
    """
    dtype = jnp.dtype(config.dtype)
    heads = constrain(heads.astype(dtype), "rows", None, "vocabulary")
    grouped = hidden.reshape(heads.shape[0], -1, hidden.shape[-1]).astype(dtype)
    out = jnp.matmul(grouped, heads, preferred_element_type=jnp.float32)
    return constrain(out.reshape(*hidden.shape[:-1], -1), "rows", None, "vocabulary")


def run_segment(
    config: ModelConfig,
    segment: Segment,
    params: dict[int, Params],
    x: Float[Array, "B T D"],
    columns: Columns,
    cache: tuple[LayerCache, ...] | None,
) -> tuple[Array, tuple[LayerCache, ...], list[Array]]:
    """Runs the layers of one segment.

    Returns:
        The new x, the caches, and the experts that every layer's tokens went to.
    """

    def pattern(
        x: Array, piece: tuple[dict[int, Params], tuple[LayerCache, ...] | None]
    ) -> tuple[Array, tuple[tuple[LayerCache, ...], list[Array]]]:
        blocks, caches = piece
        new_caches: list[LayerCache] = []
        experts: list[Array] = []
        for offset, kind in enumerate(segment.pattern):
            weights = gather_weights(blocks[offset], config.dtype)
            block = nnx.merge(graph(Block, config, kind), weights)
            out = block(x, columns, None if caches is None else caches[offset])
            x = out.x
            new_caches.append(out.cache)
            experts += [] if out.experts is None else [out.experts]
        return x, (tuple(new_caches), experts)

    run = rematerialised(config, pattern)
    if segment.repeats == 1:
        x, (new_cache, experts) = run(x, (params, cache))
        return x, new_cache, [chosen[None] for chosen in experts]
    x, (new_cache, experts) = jax.lax.scan(run, x, (params, cache))
    return x, new_cache, experts
