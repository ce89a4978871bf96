"""Mixture-of-experts feed-forward layer: every token to its k best experts, none dropped.

Tokens are sorted by expert and multiplied with the experts' matrices in one grouped product
(`jax.lax.ragged_dot`), so the work is that of k experts a token, whatever the balance. The router
works in float32: its scores decide by comparison, and a rounded one sends a token elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from occ_jax.model_config import ModelConfig, MoEConfig
from occ_jax.models.layers import SwiGLU, linear


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
        """Rows sorted by expert, `sizes` of them each."""
        gate, up, down = (part[...].astype(self.dtype) for part in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, sizes)) * jax.lax.ragged_dot(x, up, sizes)
        return jax.lax.ragged_dot(hidden, down, sizes)


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
        routing = self.router(flat)
        out = self._routed(flat, routing).reshape(x.shape)
        if self.moe.shared_intermediate_size:
            shared = self.shared(x)
            if self.moe.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            out = out + shared
        return out, routing.experts.reshape(*x.shape[:2], -1)

    def _routed(self, x: Float[Array, "N D"], routing: Routing) -> Float[Array, "N D"]:
        count = self.moe.experts_per_token
        expert = routing.experts.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        # Both permutations are told to be such, so that their transposes are no scatter-adds.
        rows = jnp.repeat(x, count, axis=0).at[order].get(unique_indices=True)
        sizes = jnp.bincount(expert, length=self.moe.num_experts).astype(jnp.int32)
        out = self.experts(rows, sizes)
        out = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
        out = out.reshape(-1, count, x.shape[-1]).astype(jnp.float32)
        return jnp.sum(out * routing.weights[..., None], axis=1).astype(x.dtype)


def _in_best_groups(scores: Float[Array, "N E"], moe: MoEConfig) -> Float[Array, "N E"]:
    """Scores with those outside the best groups at -inf; a group counts by its two best experts."""
    if moe.num_groups == 1:
        return scores
    grouped = scores.reshape(scores.shape[0], moe.num_groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, chosen = jax.lax.top_k(best, moe.groups_per_token)
    keep = jnp.any(jax.nn.one_hot(chosen, moe.num_groups, dtype=bool), axis=1)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(scores.shape)
