"""Decoder blocks, and the segments of blocks that form a trunk.

A layer is a mixer and a feed-forward part; the config chooses both. The layers of a trunk form
segments: a segment repeats one pattern of layers. The parameters of a segment with repeats are
stacked and run by a scan, so a deep model compiles as fast as its pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from occ_jax.config import ModelConfig
from occ_jax.models.attention import Attention, Columns, KVCache
from occ_jax.models.delta_net import DeltaNet, DeltaState
from occ_jax.models.latent_attention import LatentAttention, LatentCache
from occ_jax.models.layers import SwiGLU, norm
from occ_jax.models.moe import MoE
from occ_jax.parallel.sharding import constrain, current_mesh

LayerCache = KVCache | LatentCache | DeltaState

RESIDUAL = ("rows", None, None)  # dimensions of the residual stream [B, T, D]


class LayerKind(NamedTuple):
    """The two parts of a layer."""

    mixer: Literal["attention", "latent_attention", "delta_net"]
    feed_forward: Literal["dense", "moe"]


class Segment(NamedTuple):
    """Consecutive layers: `pattern`, `repeats` times."""

    first: int  # number of the first layer
    pattern: tuple[LayerKind, ...]
    repeats: int


class BlockOutput(NamedTuple):
    """Result of a block."""

    x: Float[Array, "B T D"]
    cache: LayerCache
    experts: Int[Array, "B T k"] | None  # of every token; None for a dense block


_MIXERS: dict[str, Any] = {
    "attention": Attention,
    "latent_attention": LatentAttention,
    "delta_net": DeltaNet,
}


class Block(nnx.Module):
    """A pre-norm decoder block: x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, kind: LayerKind, rngs: nnx.Rngs) -> None:
        self.mixer_norm = norm(config, config.hidden_size, rngs)
        self.mixer = _MIXERS[kind.mixer](config, rngs)
        self.feed_forward_norm = norm(config, config.hidden_size, rngs)
        if kind.feed_forward == "moe":
            self.feed_forward = MoE(config, rngs)
        else:
            self.feed_forward = SwiGLU(config, config.intermediate_size, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: LayerCache | None
    ) -> BlockOutput:
        mixed, new_cache = self.mixer(self.mixer_norm(x), columns, cache)
        x = constrain(x + mixed, *RESIDUAL)
        out = self.feed_forward(self.feed_forward_norm(x))
        out, experts = out if isinstance(out, tuple) else (out, None)
        return BlockOutput(constrain(x + out, *RESIDUAL), new_cache, experts)


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
    """The kind of every layer of the trunk."""
    attention = "attention" if config.latent_attention is None else "latent_attention"
    net, moe = config.delta_net, config.moe
    kinds: list[LayerKind] = []
    for number in range(config.num_layers):
        full = net is None or (number + 1) % net.full_attention_interval == 0
        dense = moe is None or number < moe.first_dense_layers or number in moe.dense_layers
        kinds.append(LayerKind(attention if full else "delta_net", "dense" if dense else "moe"))
    return kinds


def mtp_kind(config: ModelConfig) -> LayerKind:
    """The kind of an MTP module's block: full attention, and experts if the trunk has experts."""
    attention = "attention" if config.latent_attention is None else "latent_attention"
    return LayerKind(attention, "dense" if config.moe is None else "moe")


@functools.cache
def segments(config: ModelConfig) -> tuple[Segment, ...]:
    """The layers of a trunk in order; without `scan_layers`, every layer is a segment.

    Dense layers before the first MoE layer form a segment, and so do the layers at the end that do
    not fill a whole pattern.
    """
    kinds = layer_kinds(config)
    if not config.scan_layers:
        return tuple(Segment(number, (kind,), 1) for number, kind in enumerate(kinds))
    period = config.delta_net.full_attention_interval if config.delta_net is not None else 1
    trunk: list[Segment] = []
    start = 0
    while start < len(kinds):
        pattern = tuple(kinds[start : start + period])
        repeats = 1
        while tuple(kinds[start + repeats * period :][:period]) == pattern:
            repeats += 1
        trunk.append(Segment(start, pattern, repeats))
        start += repeats * len(pattern)
    return tuple(trunk)


def rematerialised(config: ModelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` to recompute intermediate results in the backward pass (`model.remat`)."""
    match config.remat:
        case "none" if current_mesh() is None:
            return function
        case "none":
            # Everything is kept except gathered weights, which would fill every device.
            return jax.checkpoint(function, policy=_is_kept)
        case "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            return jax.checkpoint(function, policy=policy)
        case "full":
            return jax.checkpoint(function)


def _is_kept(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Whether a result is kept: all but those of `occ_jax.parallel.sharding.gather_weights`."""
    inner = parameters.get("call_jaxpr")
    within = [] if inner is None else [equation.primitive.name for equation in inner.eqns]
    return "sharding_constraint" not in (primitive.name, *within)
