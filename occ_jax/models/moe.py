"""Mixture-of-experts feed-forward layer: every token goes to its k best experts, none is dropped.

Tokens are sorted by expert and multiplied by the experts' matrices in one grouped product
(`occ_jax.models.grouped`), so a token costs the work of k experts, however uneven the load is. The
router computes in float32: its scores are compared, and a rounded score may select another expert.

On a mesh every device sorts and multiplies its own tokens. If the experts are split over the expert
axis, tokens are sent and experts are not: the devices of the expert axis gather their tokens, each
multiplies the tokens that chose its experts, and a reduce-scatter returns the sums. This sends D
numbers per token and device of the axis, in both directions. An all-to-all of single choices would
send k x D numbers, which is no less for an expert axis of up to k devices (k is 8 in the released
models), and it would need buffers for the case that all tokens choose the same device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec as P
from jaxtyping import Array, Float, Int

from occ_jax.config import ModelConfig, MoEConfig
from occ_jax.models.grouped import grouped_product
from occ_jax.models.layers import SwiGLU, linear
from occ_jax.models.pieces import map_in_pieces
from occ_jax.parallel.sharding import ROW_AXES, current_mesh, layer_spec

# Tokens that are dispatched at once. Their k copies are the layer's largest arrays: 0.5 GB of
# bfloat16 for 8,192 tokens at k = 8 and D = 4096. With E = 128 experts, a matrix then gets 512
# rows on average, enough to be bound by arithmetic.
_TOKENS_AT_ONCE = 8192

# Added to the sum of a token's weights before they are divided by it, as in the released models.
_WEIGHT_SUM_EPSILON = 1e-20


class Routing(NamedTuple):
    """The experts of every token, and the weight of each."""

    experts: Int[Array, "N k"]
    weights: Float[Array, "N k"]  # float32


class Router(nnx.Module):
    """Scores all experts and chooses the k best, in float32."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, rngs: nnx.Rngs) -> None:
        self.moe = moe
        draw = nnx.initializers.lecun_normal()
        shape = (config.hidden_size, moe.num_experts)
        self.kernel = nnx.Param(draw(rngs.params(), shape, jnp.dtype(config.param_dtype)))
        if moe.router == "sigmoid":
            # Added for the choice of experts, not to their weights: it gets no gradient.
            self.correction_bias = nnx.Param(jnp.zeros(moe.num_experts, jnp.float32))

    def __call__(self, x: Float[Array, "N D"]) -> Routing:
        moe = self.moe
        kernel = self.kernel[...].astype(jnp.float32)
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        if moe.router == "softmax":
            weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), moe.experts_per_token)
        else:
            scores = jax.nn.sigmoid(logits)
            choice = _in_best_groups(scores + self.correction_bias[...][None], moe)
            _, experts = jax.lax.top_k(choice, moe.experts_per_token)
            weights = jnp.take_along_axis(scores, experts, axis=-1)
        if moe.normalize_weights:
            total = jnp.sum(weights, axis=-1, keepdims=True)
            weights = weights / (total + _WEIGHT_SUM_EPSILON)
        return Routing(experts, moe.weight_scale * weights)


class Experts(nnx.Module):
    """E SwiGLU networks with stacked parameters."""

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
        """Applies expert e to its `sizes[e]` rows; output rows without an expert are undefined."""
        gate, up, down = (part[...].astype(self.dtype) for part in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(grouped_product(x, gate, sizes)) * grouped_product(x, up, sizes)
        return grouped_product(hidden, down, sizes)


class MoE(nnx.Module):
    """Routed experts, plus the shared expert of all tokens if the config has one."""

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
        """Returns the layer's output and the experts of every token."""
        flat = x.reshape(-1, x.shape[-1])
        mesh = current_mesh()
        if mesh is None:
            routing = self.router(flat)
            out = _in_pieces(functools.partial(dispatch, self.experts), flat, routing)
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
    experts: Experts, x: Float[Array, "N D"], routing: Routing, shard: Int[Array, ""] | int = 0
) -> Float[Array, "N D"]:
    """Sums the weighted outputs of each token's experts, of those that `experts` holds.

    Args:
        experts: one shard of all experts, E of them.
        x: tokens.
        routing: chosen from the experts of all shards.
        shard: number of the shard: `experts` are the experts shard * E ... shard * E + E - 1.
    """
    count, num_local = routing.experts.shape[1], experts.gate.shape[0]
    chosen = routing.experts.reshape(-1) - shard * num_local
    is_local = (chosen >= 0) & (chosen < num_local)
    chosen = jnp.where(is_local, chosen, num_local)  # choices of other shards are sorted last
    # A token chooses an expert at most once, which bounds the number of local choices.
    order = jnp.argsort(chosen, stable=True)[: len(x) * min(count, num_local)]
    is_local = is_local[:, None]
    # `unique_indices` says that both are permutations, so their transposes are no scatter-adds. The
    # rows of no local expert are undefined after the product, and in its gradient: both are masked.
    rows = jnp.where(is_local, jnp.repeat(x, count, axis=0), 0)
    rows = rows.at[order].get(unique_indices=True)
    sizes = jnp.bincount(chosen, length=num_local).astype(jnp.int32)
    out = experts(rows, sizes)
    out = jnp.zeros((len(chosen), x.shape[1]), out.dtype).at[order].set(out, unique_indices=True)
    out = jnp.where(is_local, out, 0).reshape(-1, count, x.shape[1]).astype(jnp.float32)
    return jnp.sum(out * routing.weights[..., None], axis=1).astype(x.dtype)


def _on_devices(
    mesh: AbstractMesh, router: Router, experts: Experts, x: Float[Array, "N D"]
) -> tuple[Float[Array, "N D"], Int[Array, "N k"]]:
    """The layer on a mesh: every device routes its own tokens and applies its own experts."""
    weights = nnx.to_pure_dict(nnx.state(experts, nnx.Param))
    specs = {name: layer_spec(mesh, ("experts", name), w.shape) for name, w in weights.items()}
    expert_shards = mesh.shape["expert"] if specs["gate"][0] == "expert" else 1
    is_partial = specs["gate"][2] == "tensor"  # a device holds a part of every expert's width
    replicating_axes = {
        name: tuple(axis for axis in ROW_AXES if axis not in jax.tree.leaves(tuple(spec)))
        for name, spec in specs.items()
    }

    def gather(name: str, weight: Array) -> Array:
        """Gathers the residual side of the local experts, in the dtype of the products."""
        weight, side = weight.astype(experts.dtype), 2 if name == "down" else 1
        # JAX sums the gradient over the mesh axes of a `pcast`, here and below. It is placed behind
        # the rounding, so that the sum is of the products' dtype, the smallest.
        weight = jax.lax.pcast(weight, replicating_axes[name], to="varying")
        axes = specs[name][side]
        return weight if axes is None else jax.lax.all_gather(weight, axes, axis=side, tiled=True)

    def one_device(
        router_weights: Any, weights: dict[str, Array], x: Float[Array, "N D"]
    ) -> tuple[Float[Array, "N D"], Int[Array, "N k"]]:
        routing = nnx.merge(nnx.graphdef(router), router_weights)(x)
        chosen = routing.experts
        if is_partial:  # at x, as the gradients of its k copies would be k times as many to sum
            x, routing = jax.lax.pcast((x, routing), "tensor", to="varying")
        gathered = {name: gather(name, weight) for name, weight in weights.items()}
        local = nnx.merge(nnx.graphdef(experts), gathered)

        def apply_experts(x: Float[Array, "N D"], routing: Routing) -> Float[Array, "N D"]:
            if expert_shards == 1:
                return dispatch(local, x, routing)
            x, routing = jax.lax.all_gather((x, routing), "expert", tiled=True)
            out = dispatch(local, x, routing, jax.lax.axis_index("expert"))
            return jax.lax.psum_scatter(out, "expert", tiled=True)

        out = _in_pieces(apply_experts, x, routing, expert_shards)
        return jax.lax.psum(out, "tensor") if is_partial else out, chosen

    # The flat tokens are split evenly. If the row shards divide the rows, no token moves.
    rows, shards = P(ROW_AXES), math.prod(mesh.shape[axis] for axis in ROW_AXES)
    run = jax.shard_map(one_device, in_specs=(P(), specs, rows), out_specs=(rows, rows))
    router_weights, tokens = nnx.to_pure_dict(nnx.state(router, nnx.Param)), x.shape[0]
    out, chosen = run(router_weights, weights, jnp.pad(x, [(0, -tokens % shards), (0, 0)]))
    return out[:tokens], chosen[:tokens]


def _in_pieces(
    function: Callable[[Array, Routing], Array],
    x: Float[Array, "N D"],
    routing: Routing,
    devices: int = 1,
) -> Float[Array, "N D"]:
    """`function(x, routing)` on pieces; those of `devices` devices hold `_TOKENS_AT_ONCE`."""
    tokens = x.shape[0]
    pieces = -(-tokens * devices // _TOKENS_AT_ONCE)
    if pieces <= 1:
        return function(x, routing)
    return map_in_pieces(function, (x, routing), axis=0, size=-(-tokens // pieces))


def _in_best_groups(scores: Float[Array, "N E"], moe: MoEConfig) -> Float[Array, "N E"]:
    """Sets scores outside the best groups to -inf; a group is rated by its two best experts."""
    if moe.num_groups == 1:
        return scores
    grouped = scores.reshape(scores.shape[0], moe.num_groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, chosen = jax.lax.top_k(best, moe.groups_per_token)
    keep = jnp.any(jax.nn.one_hot(chosen, moe.num_groups, dtype=bool), axis=1)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(scores.shape)
