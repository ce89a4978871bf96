"""Rotary position embeddings (arXiv 2104.09864), in part of a head's dimensions, and YaRN."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from occ_jax.config import ModelConfig


class Rotary(NamedTuple):
    """The rotation of one kind of head."""

    frequencies: np.ndarray  # float32 [rotated dimensions / 2], radians a position
    factor: float  # multiplies sines and cosines


@functools.cache
def rotary(config: ModelConfig, dimensions: int) -> Rotary:
    """Frequencies for the first `dimensions` dimensions of a head.

    f_i = θ^(-2i/dimensions). YaRN divides by its factor the frequencies that turn less than
    `beta_slow` times over the original context, keeps those that turn more than `beta_fast` times,
    and interpolates linearly between the two.
    """
    half, theta, yarn = dimensions // 2, config.rope_theta, config.yarn
    frequencies = theta ** (-np.arange(half, dtype=np.float64) / half)
    if yarn is None:
        return Rotary(frequencies.astype(np.float32), 1.0)

    def dimension_of(turns: float) -> float:
        context = yarn.original_max_positions / (turns * 2 * math.pi)
        return dimensions * math.log(context) / (2 * math.log(theta))

    low, high = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    high += 0.001 if high == low else 0.0
    interpolated = np.clip((np.arange(half) - low) / (high - low), 0.0, 1.0)
    frequencies = frequencies * (1 - interpolated) + frequencies / yarn.factor * interpolated
    return Rotary(frequencies.astype(np.float32), yarn.attention_factor)


def rotate(
    x: Float[Array, "B T heads C"],
    positions: Int[Array, "B T"],
    rope: Rotary,
    *,
    interleaved: bool = False,
) -> Float[Array, "B T heads C"]:
    """Rotates the first dimensions of every head, two for each frequency.

    Args:
        x: queries or keys.
        positions: int32 position of each column.
        rope: from `rotary`.
        interleaved: whether pairs are neighbours (0, 1), (2, 3), ... (DeepSeek) instead of halves
            (i, i + n/2). The result is always in halves: queries and keys are permuted alike.
    """
    size = 2 * len(rope.frequencies)
    rotated, rest = x[..., :size].astype(jnp.float32), x[..., size:]
    first, second = (
        (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else jnp.split(rotated, 2, axis=-1)
    )
    angles = positions[..., None, None].astype(jnp.float32) * rope.frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles) * rope.factor, jnp.cos(angles) * rope.factor
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
