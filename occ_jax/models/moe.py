"""Mixture-of-experts feed-forward layer: every token to its k best experts, none dropped.

Tokens are sorted by expert and multiplied with the experts' matrices in one grouped product
(`occ_jax.models.grouped`), so the work is that of k experts a token, whatever the balance. The
router works in float32: its scores decide by comparison, and a rounded one sends a token elsewhere.

On a mesh every device sorts and multiplies its own tokens, and where experts are split, tokens
travel and experts stay: the places of the expert axis gather their tokens, each multiplies those
that chose its experts, and a reduce-scatter adds the results up where the tokens came from. That
moves D numbers a token and place there and back; an all-to-all of single choices would move k, so
up to an axis of k places (8 in the models that are released) it moves no less, and it would need
buffers for the case that all tokens choose the same place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from occ_jax.config import ModelConfig, MoEConfig
from occ_jax.models.grouped import grouped_product
from occ_jax.models.layers import SwiGLU, linear
from occ_jax.parallel.sharding import ROWS, current_mesh, layer_spec

# Tokens that are dispatched at once. Their k copies are the layer's largest arrays, and with E
# experts each sees k/E of them: at 8,192 tokens, k = 8 and E = 128 that is 512 a matrix, enough to
# be bound by arithmetic, and 0.5 GB of bfloat16 at D = 4096.
_TOKENS_AT_ONCE = 8192


class Routing(NamedTuple):
    """Which experts every token goes to, and what each of them counts."""

    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]  # float32


class Router(nnx.Module):
    """Scores of every expert, in float32."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, rngs: nnx.Rngs) -> None:
        self.moe = moe
        draw = nnx.initializers.lecun_normal()
        shape = (config.hidden_size, moe.num_experts)
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.dtype(config.param_dtype)))
        if moe.router == "sigmoid":
            # Decides which experts, not how much they count: no gradient reaches it.
            self.correction_bias = nnx.Param(jnp.zeros(moe.num_experts, jnp.float32))

    def __call__(self, x: Float[Array, "N D"]) -> Routing:
        moe = self.moe
        logits = jnp.dot(
            x.astype(jnp.float32),
            self.kernel[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        if moe.router == "softmax":
            weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), moe.experts_per_token)
        else:
            scores = jax.nn.sigmoid(logits)
            choice = _in_best_groups(scores + self.correction_bias[...][None], moe)
            _, experts = jax.lax.top_k(choice, moe.experts_per_token)
            weights = jnp.take_along_axis(scores, experts, axis=-1)
        if moe.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, moe.weight_scale * weights)


class Experts(nnx.Module):
    """E SwiGLU networks side by side."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, rngs: nnx.Rngs) -> None:
        self.dtype = jnp.dtype(config.dtype)
        param_dtype = jnp.dtype(config.param_dtype)
        draw = nnx.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        wide = (moe.num_experts, config.hidden_size, moe.intermediate_size)
        narrow = (moe.num_experts, moe.intermediate_size, config.hidden_size)
        self.gate = nnx.Param(draw(rngs.params(), wide, param_dtype))
        self.up = nnx.Param(draw(rngs.params(), wide, param_dtype))
        self.down = nnx.Param(draw(rngs.params(), narrow, param_dtype))

    def __call__(self, x: Float[Array, "N D"], sizes: Int[Array, " E"]) -> Float[Array, "N D"]:
        """Rows sorted by expert, `sizes` of them each; nothing is said of rows beyond those."""
        gate, up, down = (part[...].astype(self.dtype) for part in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(grouped_product(x, gate, sizes)) * grouped_product(x, up, sizes)
        return grouped_product(hidden, down, sizes)


class MoE(nnx.Module):
    """Routed experts plus, where there is one, the expert that every token passes."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        moe = config.moe
        assert moe is not None
        self.moe = moe
        self.router = Router(config, moe, rngs)
        self.experts = Experts(config, moe, rngs)
        if moe.shared_intermediate_size:
            self.shared = SwiGLU(config, moe.shared_intermediate_size, rngs)
        if moe.shared_gate:
            self.shared_gate = linear(config, config.hidden_size, 1, rngs)

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Int[Array, "B T k"]]:
        """The layer's output and the experts every token went to."""
        flat = x.reshape(-1, x.shape[-1])
        mesh = current_mesh()
        if mesh is None:
            routing = self.router(flat)
            out = _in_pieces(functools.partial(dispatch, self.experts), flat, routing, 1)
            chosen = routing.experts
        else:
            out, chosen = _on_devices(mesh, self.router, self.experts, flat)
        out = out.reshape(x.shape)
        if self.moe.shared_intermediate_size:
            shared = self.shared(x)
            if self.moe.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            out = out + shared
        return out, chosen.reshape(*x.shape[:2], -1)


def dispatch(
    experts: Experts, x: Float[Array, "N D"], routing: Routing, place: Int[Array, ""] | int = 0
) -> Float[Array, "N D"]:
    """The weighted sum of what each token's experts make of it, as far as they are here.

    Args:
        experts: E of them.
        x: tokens.
        routing: of all experts there are.
        place: which E of them `experts` are, counted in E.
    """
    count, here = routing.experts.shape[1], experts.gate.shape[0]
    chosen = routing.experts.reshape(-1) - place * here
    chosen = jnp.where((chosen >= 0) & (chosen < here), chosen, here)  # all others sort behind
    # A token chooses an expert once: no more than this many choices can be of these.
    order = jnp.argsort(chosen, stable=True)[: len(x) * min(count, here)]
    ours = (chosen < here)[:, None]
    # Both permutations are told to be such, so that their transposes are no scatter-adds. What
    # the product leaves in rows of no expert is undefined, also in its gradient: both `where`s.
    rows = jnp.where(ours, jnp.repeat(x, count, axis=0), 0)
    rows = rows.at[order].get(unique_indices=True)
    sizes = jnp.bincount(chosen, length=here).astype(jnp.int32)
    out = experts(rows, sizes)
    out = jnp.zeros((len(chosen), x.shape[1]), out.dtype).at[order].set(out, unique_indices=True)
    out = jnp.where(ours, out, 0).reshape(-1, count, x.shape[1]).astype(jnp.float32)
    return jnp.sum(out * routing.weights[..., None], axis=1).astype(x.dtype)


def _on_devices(
    mesh: AbstractMesh, router: Router, experts: Experts, x: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Int[Array, "N k"]]:
    """Every device routes its own tokens; `dispatch` on the tokens and the experts of a place."""
    weights = nnx.to_pure_dict(nnx.state(experts, nnx.Param))
    specs = {name: layer_spec(mesh, ("experts", name), w.shape) for name, w in weights.items()}
    places = mesh.shape["expert"] if specs["gate"][0] == "expert" else 1
    partial_sums = specs["gate"][2] == "tensor"  # a device has a part of every expert's width
    elsewhere = {
        name: tuple(axis for axis in ROWS if axis not in jax.tree.leaves(tuple(spec)))
        for name, spec in specs.items()
    }

    def gathered(name: str, weight: Array) -> Array:
        """Of the experts that are here all of the residual side, in the type they are used in."""
        weight, side = weight.astype(experts.dtype), 2 if name == "down" else 1
        # What differs between places is what their gradients are added up over, here and below: in
        # the type of the products, where they are smallest.
        weight = jax.lax.pcast(weight, elsewhere[name], to="varying")
        over = specs[name][side]
        return weight if over is None else jax.lax.all_gather(weight, over, axis=side, tiled=True)

    def one_device(
        routes: Any, weights: dict[str, Array], x: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Int[Array, "N k"]]:
        routing = nnx.merge(nnx.graphdef(router), routes)(x)
        chosen = routing.experts
        if partial_sums:  # of a token's k copies k times as much would be added up
            x, routing = jax.lax.pcast((x, routing), "tensor", to="varying")
        whole = {name: gathered(name, weight) for name, weight in weights.items()}
        here = nnx.merge(nnx.graphdef(experts), whole)

        def piece(x: Float[Array, "N D"], routing: Routing) -> Float[Array, "N D"]:
            if places == 1:
                return dispatch(here, x, routing)
            x, routing = jax.lax.all_gather((x, routing), "expert", tiled=True)
            out = dispatch(here, x, routing, jax.lax.axis_index("expert"))
            return jax.lax.psum_scatter(out, "expert", tiled=True)

        out = _in_pieces(piece, x, routing, places)
        return jax.lax.psum(out, "tensor") if partial_sums else out, chosen

    # Tokens are dealt out evenly; all of a row's lie on its device unless rows do not divide.
    tokens, shards = x.shape[0], math.prod(mesh.shape[axis] for axis in ROWS)
    out, chosen = jax.shard_map(
        one_device, in_specs=(P(), specs, P(ROWS)), out_specs=(P(ROWS), P(ROWS))
    )(
        nnx.to_pure_dict(nnx.state(router, nnx.Param)),
        weights,
        jnp.pad(x, [(0, -tokens % shards), (0, 0)]),
    )
    return out[:tokens], chosen[:tokens]


def _in_pieces(
    function: Callable[[Array, Routing], Array],
    x: Float[Array, "N D"],
    routing: Routing,
    places: int,
) -> Float[Array, "N D"]:
    """`function` of so many tokens at a time that `places` devices have `_TOKENS_AT_ONCE`.

    A piece keeps its tokens for the backward pass and makes the rest again: with all pieces'
    results kept, cutting would save nothing.
    """
    tokens = x.shape[0]
    pieces = -(-tokens * places // _TOKENS_AT_ONCE)
    if pieces <= 1:
        return function(x, routing)
    padding = -tokens % pieces

    def cut(part: Array) -> Array:
        part = jnp.pad(part, [(0, padding), (0, 0)])
        return part.reshape(pieces, -1, part.shape[1])

    again = jax.checkpoint(lambda parts: function(*parts))
    out = jax.lax.map(again, jax.tree.map(cut, (x, routing)))
    return out.reshape(-1, x.shape[1])[:tokens]


def _in_best_groups(scores: Float[Array, "N E"], moe: MoEConfig) -> Float[Array, "N E"]:
    """Scores with those outside the best groups at -inf; a group counts by its two best experts."""
    if moe.num_groups == 1:
        return scores
    grouped = scores.reshape(scores.shape[0], moe.num_groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, chosen = jax.lax.top_k(best, moe.groups_per_token)
    keep = jnp.any(jax.nn.one_hot(chosen, moe.num_groups, dtype=bool), axis=1)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(scores.shape)
