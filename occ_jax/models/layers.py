"""The two layers everything else is made of: a linear map and RMSNorm."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from occ_jax.config import ModelConfig


class Linear(nnx.Linear):
    """`nnx.Linear` on rows and columns flattened to one dimension.

    With [B, T, D] inputs the weight gradient contracts two dimensions at once, which XLA's CPU
    backend does by transposing both operands: twice the time of the flat product on a small model.
    On accelerators the two forms compile to the same product.
    """

    def __call__(self, x: Float[Array, "B T X"]) -> Float[Array, "B T Y"]:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


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


def norm(config: ModelConfig, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with a learned scale, statistics in float32 (arXiv 1910.07467)."""
    return nnx.RMSNorm(
        size,
        epsilon=config.rms_norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )
