"""The gated delta net: linear attention that corrects its state instead of only adding to it.

    S_t = e^(g_t) S_(t-1) + k_t (β_t (v_t - e^(g_t) S_(t-1)ᵀ k_t))ᵀ,     o_t = S_tᵀ q_t

The cost of a column does not depend on the length of the context, and the cache is one matrix per
head. Sequences are computed in chunks, in which the recurrence becomes matrix products. Single
columns use the recurrence itself.

Source:
    arXiv 2412.06464, equation 10 and section 3.3, as released in Qwen3-Next.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from occ_jax.config import ModelConfig
from occ_jax.models.attention import BY_HEAD, Columns
from occ_jax.models.layers import linear, norm
from occ_jax.models.pieces import join, split
from occ_jax.parallel.sharding import constrain

# The range of decay rates at initialisation, and what is added to squared norms of queries and
# keys: both as in the released models.
_MIN_RATE, _MAX_RATE = 0.01, 16.0
_NORM_EPSILON = 1e-6

# Dimensions of the cache's two arrays.
WINDOW, STATE = ("rows", None, None), ("rows", "heads", None, None)


class DeltaState(NamedTuple):
    """The cache of one layer."""

    window: Float[Array, "B W-1 X"]  # inputs of the convolution at the last columns
    state: Float[Array, "B H C X"]  # float32; S, keys by values


class Signals(NamedTuple):
    """Inputs of the recurrence for every value head, float32."""

    query: Float[Array, "B T H C"]
    key: Float[Array, "B T H C"]
    value: Float[Array, "B T H X"]
    log_decay: Float[Array, "B T H"]  # g <= 0
    beta: Float[Array, "B T H"]  # in (0, 1)


class DeltaNet(nnx.Module):
    """Projections, short convolution, gated delta rule, gated norm, output."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        net = config.delta_net
        assert net is not None
        self.config, self.net = config, net
        size, values = config.hidden_size, net.num_value_heads * net.value_head_dim
        channels = 2 * net.num_key_heads * net.key_head_dim + values
        self.qkv = linear(config, size, channels, rngs)
        self.gate = linear(config, size, values, rngs)
        self.beta = linear(config, size, net.num_value_heads, rngs)
        self.decay = linear(config, size, net.num_value_heads, rngs)
        draw = nnx.initializers.lecun_normal(in_axis=0, out_axis=1)
        self.convolution = nnx.Param(
            draw(rngs.params(), (net.conv_width, channels), jnp.dtype(config.param_dtype))
        )
        heads = (net.num_value_heads,)
        rates = jax.random.uniform(rngs.params(), heads, minval=_MIN_RATE, maxval=_MAX_RATE)
        self.log_rate = nnx.Param(jnp.log(rates))
        self.decay_bias = nnx.Param(jnp.ones(net.num_value_heads))
        self.norm = norm(config, net.value_head_dim, rngs, zero_centered=False)
        self.output = linear(config, values, size, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: DeltaState | None
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        """Continues from `cache`; columns without a token do not change the state."""
        valid = jax.lax.dynamic_slice_in_dim(columns.valid, columns.index, x.shape[1], axis=1)
        x = jnp.where(valid[..., None], x, 0)
        if cache is None:
            cache = self._empty(x.shape[0])
        mixed, window = self._convolve(self.qkv(x), cache.window)
        signals = self._signals(x, mixed, valid)
        if x.shape[1] == 1:
            out, state = delta_step(signals, cache.state)
        else:
            out, state = delta_chunks(signals, cache.state, self.net.chunk_size)
        gate = self.gate(x).reshape(out.shape).astype(jnp.float32)
        out = self.norm(out).astype(jnp.float32) * jax.nn.silu(gate)
        out = out.astype(x.dtype).reshape(*x.shape[:2], -1)
        window = constrain(window.astype(cache.window.dtype), *WINDOW)
        return self.output(out), DeltaState(window, constrain(state, *STATE))

    def _empty(self, rows: int) -> DeltaState:
        """The state before the first column."""
        net, (width, channels) = self.net, self.convolution.shape
        state = (rows, net.num_value_heads, net.key_head_dim, net.value_head_dim)
        window = jnp.zeros((rows, width - 1, channels), self.config.dtype)
        return DeltaState(window, jnp.zeros(state, jnp.float32))

    def _convolve(self, x: Array, window: Array) -> tuple[Array, Array]:
        """Applies silu(causal convolution per channel); returns the next window as well."""
        width, columns = self.net.conv_width, x.shape[1]
        padded = jnp.concatenate([window.astype(x.dtype), x], axis=1)
        kernel = self.convolution[...].astype(x.dtype)
        taps = (padded[:, i : i + columns] * kernel[i][None, None] for i in range(width))
        return jax.nn.silu(sum(taps, jnp.zeros_like(x))), padded[:, columns:]

    def _signals(self, x: Array, mixed: Array, valid: Bool[Array, "B T"]) -> Signals:
        net, shape = self.net, (*x.shape[:2], -1)
        keys = net.num_key_heads * net.key_head_dim
        query, key, value = jnp.split(mixed.astype(jnp.float32), [keys, 2 * keys], axis=-1)
        query = _normalise(query.reshape(*shape, net.key_head_dim)) * net.key_head_dim**-0.5
        key = _normalise(key.reshape(*shape, net.key_head_dim))
        shared = net.num_value_heads // net.num_key_heads
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))[None, None]
        bias = self.decay_bias[...].astype(jnp.float32)[None, None]
        decay = -rate * jax.nn.softplus(self.decay(x).astype(jnp.float32) + bias)
        beta, real = jax.nn.sigmoid(self.beta(x).astype(jnp.float32)), valid[..., None]
        signals = Signals(
            query=jnp.repeat(query, shared, axis=2),
            key=jnp.repeat(key, shared, axis=2),
            value=value.reshape(*shape, net.value_head_dim),
            log_decay=jnp.where(real, decay, 0.0),
            beta=jnp.where(real, beta, 0.0),
        )
        return Signals(*(constrain(x, *BY_HEAD[: x.ndim]) for x in signals))


def delta_step(
    signals: Signals, state: Float[Array, "B H C X"]
) -> tuple[Float[Array, "B 1 H X"], Float[Array, "B H C X"]]:
    """The recurrence for a single column (T = 1), from S before it to o and S after it."""
    query, key, value, log_decay, beta = (part[:, 0] for part in signals)
    state = jnp.exp(log_decay)[..., None, None] * state
    correction = beta[..., None] * (value - jnp.einsum("bhcx,bhc->bhx", state, key))
    state = state + key[..., :, None] * correction[..., None, :]
    return jnp.einsum("bhcx,bhc->bhx", state, query)[:, None], state


def delta_chunks(
    signals: Signals, state: Float[Array, "B H C X"], size: int
) -> tuple[Float[Array, "B T H X"], Float[Array, "B H C X"]]:
    """The recurrence over T columns, `size` at a time.

    Let d_i be the sum of the log-decays of a chunk up to column i. The corrections u of the chunk
    solve a unit triangular system,

        (I + L) u = β (v - e^d (Sᵀ k)),     L_ij = β_i e^(d_i - d_j) k_i · k_j for j < i.

    Then o and the next S are matrix products with u.

    Args:
        signals: any T; the last chunk is filled up with β = g = 0, which changes nothing.
        state: S before the first column.
        size: columns per chunk.

    Returns:
        o and S after the last column.
    """
    columns = signals.query.shape[1]
    size = min(size, columns)

    def chunk(state: Array, piece: Signals) -> tuple[Array, Array]:
        query, key, value, log_decay, beta = piece
        total = jnp.cumsum(log_decay, axis=-1)
        # e^(d_i - d_j) is used for j <= i only: above the diagonal it may overflow.
        lower = jnp.tril(jnp.ones((size, size), bool))[None, None]
        difference = jnp.where(lower, total[..., :, None] - total[..., None, :], 0.0)
        decay = jnp.where(lower, jnp.exp(difference), 0.0)
        weighted = beta[..., None] * key
        system = jnp.einsum("bhic,bhjc->bhij", weighted, key) * decay
        decay_from_start = jnp.exp(total)[..., None]
        predicted = jnp.einsum("bhic,bhcx->bhix", weighted * decay_from_start, state)
        target = beta[..., None] * value - predicted
        corrections = jax.lax.linalg.triangular_solve(
            system, target, left_side=True, lower=True, unit_diagonal=True
        )
        scores = jnp.einsum("bhic,bhjc->bhij", query, key) * decay
        out = jnp.einsum("bhic,bhcx->bhix", query * decay_from_start, state)
        out += jnp.einsum("bhij,bhjx->bhix", scores, corrections)
        decay_to_end = jnp.exp(total[..., -1:] - total)[..., None]
        state = jnp.exp(total[..., -1])[..., None, None] * state
        state += jnp.einsum("bhjc,bhjx->bhcx", key * decay_to_end, corrections)
        return state, out

    # [B, T, H, ...] to [chunks, B, H, size, ...] and back.
    pieces = Signals(*(jnp.moveaxis(split(x, 1, size), 3, 2) for x in signals))
    state, out = jax.lax.scan(chunk, state, pieces)
    return join(jnp.moveaxis(out, 2, 3), 1, columns), state


def _normalise(x: Float[Array, "B T H C"]) -> Float[Array, "B T H C"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _NORM_EPSILON)
