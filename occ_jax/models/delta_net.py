"""The gated delta net: linear attention whose state is corrected, not only added to.

    S_t = e^(g_t) S_(t-1) + k_t (beta_t (v_t - e^(g_t) S_(t-1)^T k_t))^T,     o_t = S_t^T q_t

(arXiv 2412.06464, equation 10, as released in Qwen3-Next). A column costs the same however long the
context is, and the cache is one matrix a head. Sequences are worked on in chunks, inside which the
recurrence becomes matrix products (section 3.3 there); single columns take the recurrence itself.
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
from occ_jax.parallel.sharding import constrain

# What a layer remembers, on the mesh.
WINDOW, STATE = ("rows", None, None), ("rows", "heads", None, None)


class DeltaState(NamedTuple):
    """All that one layer remembers."""

    window: Float[Array, "B W-1 X"]  # the last columns before the convolution
    state: Float[Array, "B H C X"]  # float32; S, keys by values


class Signals(NamedTuple):
    """What drives the recurrence, by head, float32."""

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
        rates = jax.random.uniform(rngs.params(), (net.num_value_heads,), minval=0.01, maxval=16.0)
        self.log_rate = nnx.Param(jnp.log(rates))
        self.decay_bias = nnx.Param(jnp.ones(net.num_value_heads))
        self.norm = norm(config, net.value_head_dim, rngs, zero_centered=False)
        self.output = linear(config, values, size, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], columns: Columns, cache: DeltaState | None
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        """Goes on from `cache`; columns that hold no token leave the state as it is."""
        valid = jax.lax.dynamic_slice_in_dim(columns.valid, columns.index, x.shape[1], axis=1)
        x = jnp.where(valid[..., None], x, 0)
        if cache is None:
            cache = empty_state(self.config, x.shape[0])
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

    def _convolve(self, x: Array, before: Array) -> tuple[Array, Array]:
        """silu of a causal convolution, each channel by itself, and the columns to carry on."""
        width, columns = self.net.conv_width, x.shape[1]
        padded = jnp.concatenate([before.astype(x.dtype), x], axis=1)
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
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        real = valid[..., None]
        signals = Signals(
            query=jnp.repeat(query, shared, axis=2),
            key=jnp.repeat(key, shared, axis=2),
            value=value.reshape(*shape, net.value_head_dim),
            log_decay=jnp.where(real, decay, 0.0),
            beta=jnp.where(real, beta, 0.0),
        )
        return Signals(*(constrain(x, *BY_HEAD[: x.ndim]) for x in signals))


def empty_state(config: ModelConfig, rows: int) -> DeltaState:
    """Nothing seen yet."""
    net = config.delta_net
    assert net is not None
    channels = 2 * net.num_key_heads * net.key_head_dim + net.num_value_heads * net.value_head_dim
    state = (rows, net.num_value_heads, net.key_head_dim, net.value_head_dim)
    return DeltaState(
        jnp.zeros((rows, net.conv_width - 1, channels), config.dtype),
        jnp.zeros(state, jnp.float32),
    )


def delta_step(
    signals: Signals, state: Float[Array, "B H C X"]
) -> tuple[Float[Array, "B 1 H X"], Float[Array, "B H C X"]]:
    """The recurrence for a single column.

    Args:
        signals: T = 1.
        state: S before it.

    Returns:
        o and S after it.
    """
    query, key, value, log_decay, beta = (part[:, 0] for part in signals)
    state = jnp.exp(log_decay)[..., None, None] * state
    correction = beta[..., None] * (value - jnp.einsum("bhcx,bhc->bhx", state, key))
    state = state + key[..., :, None] * correction[..., None, :]
    return jnp.einsum("bhcx,bhc->bhx", state, query)[:, None], state


def delta_chunks(
    signals: Signals, state: Float[Array, "B H C X"], size: int
) -> tuple[Float[Array, "B T H X"], Float[Array, "B H C X"]]:
    """The recurrence over T columns, `size` at a time.

    With d_i the log-decay added up over a chunk to column i, the corrections u of a chunk solve

        (I + L) u = beta (v - e^d (S^T k)),     L_ij = beta_i e^(d_i - d_j) k_i . k_j for j < i,

    a unit triangular system; then o and the next S are matrix products with u.

    Args:
        signals: any T; columns beyond it are added with beta = g = 0, which change nothing.
        state: S before the first column.
        size: columns a chunk.

    Returns:
        o and S after the last column.
    """
    columns = signals.query.shape[1]
    size = min(size, columns)
    padding = -columns % size

    def cut(x: Array) -> Array:
        """[B, T, H, ...] to [chunks, B, H, size, ...]."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    def chunk(state: Array, piece: Signals) -> tuple[Array, Array]:
        query, key, value, log_decay, beta = piece
        total = jnp.cumsum(log_decay, axis=-1)
        # e^(d_i - d_j) for j <= i only: above the diagonal it may overflow.
        lower = jnp.tril(jnp.ones((size, size), bool))[None, None]
        apart = jnp.where(lower, total[..., :, None] - total[..., None, :], 0.0)
        between = jnp.where(lower, jnp.exp(apart), 0.0)
        weighted = beta[..., None] * key
        system = jnp.einsum("bhic,bhjc->bhij", weighted, key) * between
        grown = jnp.exp(total)[..., None]
        target = beta[..., None] * value - jnp.einsum("bhic,bhcx->bhix", weighted * grown, state)
        corrections = jax.lax.linalg.triangular_solve(
            system, target, left_side=True, lower=True, unit_diagonal=True
        )
        within = jnp.einsum("bhic,bhjc->bhij", query, key) * between
        out = jnp.einsum("bhic,bhcx->bhix", query * grown, state)
        out += jnp.einsum("bhij,bhjx->bhix", within, corrections)
        left = jnp.exp(total[..., -1:] - total)[..., None]
        state = jnp.exp(total[..., -1])[..., None, None] * state
        state += jnp.einsum("bhjc,bhjx->bhcx", key * left, corrections)
        return state, out

    state, out = jax.lax.scan(chunk, state, Signals(*map(cut, signals)))
    out = jnp.moveaxis(jnp.moveaxis(out, 2, 3), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :columns], state


def _normalise(x: Float[Array, "B T H C"]) -> Float[Array, "B T H C"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
