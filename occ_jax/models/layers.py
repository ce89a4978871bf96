"""Parts that all layers share: linear maps, norms and the dense feed-forward part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from occ_jax.config import ModelConfig

_TILE = 128  # columns of a TPU's tile


def whole_tiles(x: Array) -> Array:
    """Pads [B, T, ...] with zero columns on the right until T is a multiple of 128.

    A TPU stores the last two dimensions of an array in tiles. A matrix product merges rows and
    columns to one dimension, [B T, D]. Only if T fills its tiles does that move no data: for
    sequences of 10,240 tokens, whose last token predicts nothing, the 10,239 columns are copied to
    another layout around every product of every layer. A sequence is left as it is if padding would
    add more than an eighth to the work.
    """
    columns = x.shape[1]
    padding = -columns % _TILE
    if 8 * padding > columns:
        return x
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))


class Linear(nnx.Linear):
    """`nnx.Linear` with rows and columns flattened to one dimension.

    With inputs [B, T, D], the weight gradient contracts two dimensions at once. XLA's CPU backend
    transposes both operands for that, which takes twice the time of the flat product on a small
    model. On accelerators both forms compile to the same product if T fills its tiles
    (`whole_tiles`).
    """

    def __call__(self, x: Float[Array, "B T X"]) -> Float[Array, "B T Y"]:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


class RMSNorm(nnx.RMSNorm):
    """`nnx.RMSNorm` computed in float32, including the product with the scale, and rounded once."""

    def __init__(self, result_dtype: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, dtype=jnp.float32, **options)
        self.result_dtype = jnp.dtype(result_dtype)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return super().__call__(x).astype(self.result_dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, width: int, rngs: nnx.Rngs) -> None:
        size = config.hidden_size
        self.gate = linear(config, size, width, rngs)
        self.up = linear(config, size, width, rngs)
        self.down = linear(config, width, size, rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def linear(
    config: ModelConfig, size_in: int, size_out: int, rngs: nnx.Rngs, *, use_bias: bool = False
) -> Linear:
    """x W, or x W + b."""
    return Linear(
        size_in,
        size_out,
        use_bias=use_bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def norm(
    config: ModelConfig,
    size: int,
    rngs: nnx.Rngs,
    *,
    zero_centered: bool = True,
    epsilon: float | None = None,
) -> RMSNorm:
    """RMSNorm with a learned scale.

    Args:
        config: epsilon, dtypes and the kind of scale.
        size: size of the last dimension, which is normalised.
        rngs: not used, but Flax requires it.
        zero_centered: False to multiply by scale even if the config says 1 + scale.
        epsilon: added to the mean square; None for the config's value.

    Source:
        Zhang and Sennrich, arXiv 1910.07467.
    """
    kind: dict[str, Any] = {}
    if zero_centered and config.zero_centered_norm:
        kind = {"scale_init": nnx.initializers.zeros_init(), "promote_dtype": _promote_one_plus}
    return RMSNorm(
        config.dtype,
        size,
        epsilon=config.rms_norm_eps if epsilon is None else epsilon,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
        **kind,
    )


def _promote_one_plus(arrays: tuple[Array, Array], *, dtype: Any) -> tuple[Array, Array]:
    x, scale = promote_dtype(arrays, dtype=dtype)
    return x, 1.0 + scale
