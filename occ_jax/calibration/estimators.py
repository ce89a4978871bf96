"""Ways to measure c = <g, h_k> and G = <h_k, h_l> other than inner products of one batch.

Owns three: `cross_batch_statistics` removes the bias of gradients that come from the same samples;
`log_prob_statistics` needs no auxiliary gradient; `released_code_coefficient` is the rule of the
paper's released code, kept for reproduction. Leaves λ and the averages over steps to
`occ_jax.calibration.transform`, and the choice of a measurement to the training step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from occ_jax.calibration.transform import Statistics, inner_product_statistics

# Only type checkers read the shapes: the calibration runs where jax and optax alone are installed.
if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped


def cross_batch_statistics(
    updates_sum: Any, auxiliary_sum: Any, within: Float[Array, "K"], num_micro_batches: int
) -> Statistics:
    r"""Measures c between different micro-batches, and G of the mean over all of them.

    .. math:: c_k = \frac{\langle \sum_m g_m, \sum_m h_{mk} \rangle - \mathrm{within}_k}{M (M - 1)},
      \qquad G_{kl} = \frac{\langle \sum_m h_{mk}, \sum_m h_{ml} \rangle}{M^2}

    c is the mean of :math:`\langle g_m, h_{nk} \rangle` over :math:`m \ne n`. On the same samples
    the noise of g and the noise of h are correlated, so the inner product of their means exceeds
    :math:`\langle E g, E h \rangle` by :math:`\operatorname{tr} \operatorname{Cov}(g, h) / M`.
    Between independent micro-batches that term is absent and c is unbiased. G keeps its noise on
    purpose: the step that is taken contains it, so the penalty must count it. The method stores
    one number per module beside the two sums.

    Args:
        updates_sum: Σ_m g_m, a pytree of arrays.
        auxiliary_sum: Σ_m h_mk, one pytree like `updates_sum` or a list or tuple of K.
        within: Σ_m <g_m, h_mk> [K], float32: the sum over micro-batches of the ``correlation`` that
            `inner_product_statistics` measures on each.
        num_micro_batches: M, a static int, at least 2.

    Returns:
        c [K] and G [K, K], float32.

    Raises:
        ValueError: There are fewer than 2 micro-batches, or `within` is not [K].

    Example:
        >>> import jax.numpy as jnp
        >>> from occ_jax.calibration import cross_batch_statistics
        >>> g, h = jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0])  # one parameter, two micro-batches
        >>> statistics = cross_batch_statistics(g.sum(), h.sum(), jnp.sum(g * h)[None], 2)
        >>> statistics.correlation.tolist()  # the mean of 1 * 4 and 3 * 2
        [5.0]
    """
    if num_micro_batches < 2:
        raise ValueError(f"num_micro_batches must be at least 2, got {num_micro_batches}")
    total = inner_product_statistics(updates_sum, auxiliary_sum)
    if within.shape != total.correlation.shape:
        raise ValueError(
            f"within must be of shape {total.correlation.shape}, one number per auxiliary "
            f"gradient, got {within.shape}"
        )
    across = (total.correlation - within.astype(jnp.float32)) / float(
        num_micro_batches * (num_micro_batches - 1)
    )
    return Statistics(across, total.penalty / float(num_micro_batches**2))


def log_prob_statistics(
    delta: Float[Array, "B T"],
    auxiliary_delta: Float[Array, "K B T"] | Float[Array, "B T"],
    mask: Shaped[Array, "B T"] | Shaped[Array, "K B T"],
) -> Statistics:
    r"""Measures both statistics on log-probabilities, without any auxiliary gradient.

    .. math:: \hat c_k = \sum_{bt} m_k\, \delta\, \delta_k, \qquad
      \hat G_{kl} = \sum_{bt} m_k m_l\, \delta_k \delta_l

    δ is the log-probability of each sampled token now, minus the one at the time of the rollout.
    The paper uses these sums instead of inner products of gradients; a common factor cancels in λ.
    Updates on *other* mini-batches caused δ, so noise of the same samples is not counted as
    correlation. In the first mini-batch after a rollout every δ is zero, and so are both
    statistics. A schedule with one update per rollout therefore measures nothing, and any other
    needs ``calibrate_auxiliary(decay=...)`` above zero, which carries λ through that mini-batch.

    Args:
        delta: δ of the main head [B, T], any float dtype.
        auxiliary_delta: δ_k of each module [K, B, T], or [B, T] for one, aligned with `delta`.
        mask: [B, T] or one per module [K, B, T]; non-zero where the token counts. Values at other
            tokens, NaN included, do not reach the result.

    Returns:
        ĉ [K] and Ĝ [K, K], float32, without gradient.

    Raises:
        ValueError: The shapes do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> from occ_jax.calibration import log_prob_statistics, optimal_coefficient
        >>> delta = jnp.array([[0.2, -0.1, 0.4]])  # one completion of three tokens
        >>> auxiliary_delta = jnp.array([[0.4, -0.2, 9.0]])
        >>> mask = jnp.array([[1, 1, 0]])  # the third token is padding
        >>> statistics = log_prob_statistics(delta, auxiliary_delta, mask)
        >>> [round(float(x), 2) for x in optimal_coefficient(statistics)]  # 0.1 / 0.2
        [0.5]

    Source:
        `arXiv 2605.28184 <https://arxiv.org/abs/2605.28184>`_, the log-probability proxy (K = 1).
    """
    delta, auxiliary_delta = _as_data(delta, auxiliary_delta)
    counted = (mask if mask.ndim == 3 else mask[None]) != 0
    if counted.shape[1:] != delta.shape or counted.shape[0] not in (1, auxiliary_delta.shape[0]):
        raise ValueError(
            f"mask must be of shape {delta.shape} or {auxiliary_delta.shape}, got {mask.shape}"
        )
    # Zeros go in before the product: padding may hold NaN, and 0 * NaN is NaN.
    counted = jnp.broadcast_to(counted, auxiliary_delta.shape)
    main = jnp.where(counted, delta[None], 0.0)
    auxiliary = jnp.where(counted, auxiliary_delta, 0.0)
    # Sums and not an einsum, which would run in bfloat16 on a TPU and fails where B is sharded on
    # an Explicit mesh.
    correlation = jnp.sum(main * auxiliary, axis=(-2, -1))
    penalty = jnp.sum(auxiliary[:, None] * auxiliary[None, :], axis=(-2, -1))
    return Statistics(correlation, penalty)


def released_code_coefficient(
    delta: Float[Array, "B T"],
    auxiliary_delta: Float[Array, "K B T"] | Float[Array, "B T"],
    factor: float = 0.1,
) -> Float[Array, "K"]:
    r"""Computes λ as the paper's released code does; for reproduction, not for use.

    .. math:: \lambda_k = \frac{\mathrm{factor}}{K}\; \frac{1}{B T}
      \sum_{bt} \frac{\delta_k\, \delta}{\delta_k^2 + 10^{-8}}

    It is not the default, for three reasons. It is a mean of ratios and not a ratio of sums: a
    token whose δ_k is near 1e-4 counts for up to 5e3 times its δ and outweighs all others. It
    averages over all positions, so λ shrinks as the share of padding grows, and values in padding
    count. It uses one micro-batch alone, and is neither averaged over steps nor bounded.

    Args:
        delta: δ of the main head [B, T].
        auxiliary_delta: [K, B, T], or [B, T] for one module. The released code passes the module's
            log-probability minus the old one of the *main* head.
        factor: Multiplies the mean.

    Returns:
        λ [K], float32, without gradient.

    Raises:
        ValueError: The shapes do not fit together.

    Source:
        The public code of `arXiv 2605.28184 <https://arxiv.org/abs/2605.28184>`_.
    """
    delta, auxiliary_delta = _as_data(delta, auxiliary_delta)
    ratio = auxiliary_delta * delta[None] / (jnp.square(auxiliary_delta) + 1e-8)
    return factor / auxiliary_delta.shape[0] * jnp.mean(ratio, axis=(-2, -1))


def _as_data(
    delta: Float[Array, "B T"], auxiliary_delta: Float[Array, "K B T"] | Float[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "K B T"]]:
    """Returns both as float32 without gradient, the second with its axis of modules."""
    # λ is a constant of the step: a loss that is multiplied by it must not be lowered through it.
    delta = jax.lax.stop_gradient(delta).astype(jnp.float32)
    auxiliary = jax.lax.stop_gradient(auxiliary_delta).astype(jnp.float32)
    auxiliary = auxiliary if auxiliary.ndim == 3 else auxiliary[None]
    if auxiliary.shape[1:] != delta.shape:
        raise ValueError(
            f"auxiliary_delta must be [K, B, T] or [B, T] with [B, T] = {delta.shape}, got "
            f"{auxiliary_delta.shape}"
        )
    return delta, auxiliary
