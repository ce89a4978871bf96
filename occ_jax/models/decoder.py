"""The decoder trunk as a pure function of its parameters: embedding, segments of layers, head.

Its parameters are theta, everything the next-token path uses: {"embed", "layers", "final_norm",
"head"}, and under "layers" one dictionary a segment, {0: block, 1: block...} for its pattern, every
leaf with an axis of repeats in front where there is more than one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
from occ_jax.parallel.sharding import constrain, gathered
from occ_jax.types import Params

Cache = Sequence[tuple[LayerCache, ...]]
"""For every segment the cache of each layer of its pattern, stacked like its parameters."""


class TrunkOutput(NamedTuple):
    """What the trunk hands on."""

    hidden: Float[Array, "B T D"]  # after the final norm: what the output head reads
    mtp_input: Float[Array, "B T D"]  # what enters the first MTP module
    cache: list[tuple[LayerCache, ...]]
    experts: list[Int[Array, "repeats B T k"]]  # where each mixture of experts sent every token


class Ends(nnx.Module):
    """What comes before the layers and after them."""

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
        """The token embedding."""
        table = self.embed.embedding[...].astype(self.config.dtype)
        # Constrained for its cotangent: every device scatters its own tokens' before they are
        # added up and cut for where the parameter is stored, not the other way round.
        table = constrain(table, "vocabulary", None)
        return constrain(jnp.take(table, tokens, axis=0), *RESIDUAL)


@functools.cache
def graph(module: Callable[..., nnx.Module], config: ModelConfig, *kind: LayerKind) -> Any:
    """The static half of a module, made without allocating a parameter."""
    return nnx.graphdef(nnx.eval_shape(lambda: module(config, *kind, nnx.Rngs(params=0))))


def init_module(
    module: Callable[..., nnx.Module], config: ModelConfig, key: Key[Array, ""], *kind: LayerKind
) -> Params:
    """The other half, drawn at random."""
    return nnx.to_pure_dict(nnx.state(module(config, *kind, nnx.Rngs(params=key)), nnx.Param))


def init_trunk(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Random parameters; a layer's depend on its number alone, not on how layers are stacked."""
    ends, layers = jax.random.split(key)

    def init_block(kind: LayerKind, numbers: Int[Array, " repeats"]) -> Params:
        def one(number: Int[Array, ""]) -> Params:
            return init_module(Block, config, jax.random.fold_in(layers, number), kind)

        return jax.vmap(one)(numbers) if len(numbers) > 1 else one(numbers[0])

    stacked = {
        index: {
            place: init_block(
                kind,
                segment.first + place + len(segment.pattern) * jnp.arange(segment.repeats),
            )
            for place, kind in enumerate(segment.pattern)
        }
        for index, segment in enumerate(segments(config))
    }
    return {**init_module(Ends, config, ends), "layers": stacked}


def ends(config: ModelConfig, theta: Params) -> Ends:
    """Embedding, final norm and head of a trunk."""
    own = {name: part for name, part in theta.items() if name != "layers"}
    return nnx.merge(graph(Ends, config), gathered(own, config.dtype))


def output_head(config: ModelConfig, theta: Params) -> Float[Array, "D V"]:
    """The matrix of the output head; the embedding's transpose where they are tied."""
    frame = ends(config, theta)
    return frame.embed.embedding[...].T if config.tie_embeddings else frame.head.kernel[...]


def read_head(
    config: ModelConfig, heads: Float[Array, "P D V"], hidden: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits, float32: products add up and stay in it, whatever the operands' type.

    Args:
        config: `dtype` is that of the products.
        heads: the output head, or P copies of it of which each is read by B/P rows in a row.
        hidden: states after a final norm.
    """
    dtype = jnp.dtype(config.dtype)
    heads = constrain(heads.astype(dtype), "rows", None, "vocabulary")
    dealt = hidden.reshape(heads.shape[0], -1, hidden.shape[-1]).astype(dtype)
    out = jnp.matmul(dealt, heads, preferred_element_type=jnp.float32)
    return constrain(out.reshape(*hidden.shape[:-1], -1), "rows", None, "vocabulary")


def run_trunk(
    config: ModelConfig,
    theta: Params,
    tokens: Int[Array, "B T"],
    columns: Columns,
    cache: Cache | None,
) -> TrunkOutput:
    """Embedding, layers, final norm; see `Model.trunk`."""
    frame = ends(config, theta)
    x = frame.embeddings(tokens)
    new: list[tuple[LayerCache, ...]] = []
    experts: list[Array] = []
    for index, segment in enumerate(segments(config)):
        before = None if cache is None else cache[index]
        x, after, chosen = _run_segment(config, segment, theta["layers"][index], x, columns, before)
        new.append(after)
        experts += chosen
    hidden = frame.final_norm(x)
    pre_norm = config.mtp_trunk_hidden == "pre_norm"
    return TrunkOutput(hidden, x if pre_norm else hidden, new, experts)


def _run_segment(
    config: ModelConfig,
    segment: Segment,
    params: dict[int, Params],
    x: Float[Array, "B T D"],
    columns: Columns,
    cache: tuple[LayerCache, ...] | None,
) -> tuple[Array, tuple[LayerCache, ...], list[Array]]:
    """The layers of one segment: new x, caches, and where the experts of each layer sent tokens."""

    def pattern(
        x: Array, piece: tuple[dict[int, Params], tuple[LayerCache, ...] | None]
    ) -> tuple[Array, tuple[tuple[LayerCache, ...], list[Array]]]:
        blocks, before = piece
        after: list[LayerCache] = []
        experts: list[Array] = []
        for place, kind in enumerate(segment.pattern):
            block = nnx.merge(graph(Block, config, kind), gathered(blocks[place], config.dtype))
            out = block(x, columns, None if before is None else before[place])
            x = out.x
            after.append(out.cache)
            experts += [] if out.experts is None else [out.experts]
        return x, (tuple(after), experts)

    run = rematerialised(config, pattern)
    if segment.repeats == 1:
        x, (after, experts) = run(x, (params, cache))
        return x, after, [chosen[None] for chosen in experts]
    x, (after, experts) = jax.lax.scan(run, x, (params, cache))
    return x, after, experts
