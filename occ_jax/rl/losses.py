"""Losses on the log-probabilities of sampled tokens, each as an unreduced sum and its denominator.

Owns the three policy losses, cross-entropy, the KL penalty, rollout correction and the ways tokens
are averaged. Leaves log-probabilities to `models`, advantages to `advantages`, and the division of
the sums to `objective`.

Three rules hold throughout. Arithmetic is float32 for every input dtype. A mask's non-zero entries
are trained on; values under the others, NaN and infinities included, reach neither the value nor
the gradient. Old, reference and rollout log-probabilities and advantages are data: no gradient.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from occ_jax.config import Aggregation

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)

# 1 or True where a token is trained on, 0 or False elsewhere.
Mask = Bool[Array, "B T"] | Float[Array, "B T"]

# Beyond e^20 a ratio says only that something is wrong; past e^88 it would overflow float32.
_LOG_RATIO_BOUND = 20.0
_GSPO_LOG_RATIO_MAX = 10.0
_K3_BOUND = 10.0


class Loss(NamedTuple):
    """A loss before its division: `mean(loss)` = sum / denominator.

    Micro-batches and shards are combined exactly by adding every field, metrics included
    (`jax.tree.map(jnp.add, a, b)`). For gradients over micro-batches, divide each `sum` by the
    denominator of the whole mini-batch (`aggregation_denominator` before the split).
    """

    sum: Float[Array, ""]
    denominator: Float[Array, ""]
    # Sums over trained tokens, whatever the aggregation; after adding micro-batches, divide by
    # metrics["tokens"], their count, for the mean per token. Stopped, float32 scalars.
    metrics: dict[str, Float[Array, ""]]


def mean(loss: Loss) -> Float[Array, ""]:
    """Divides the sum by the denominator; 0 (and zero gradient) where nothing was trained on.

    Args:
        loss: a loss, or several added up.

    Returns:
        sum / denominator, float32, or 0 if the denominator is 0.
    """
    return loss.sum / jnp.where(loss.denominator > 0, loss.denominator, 1.0)


# The policy losses take more than seven arguments: the symbols of their published equations, which
# users set one by one.
def clipped_policy_loss(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> Loss:
    """Clipped surrogate of PPO and GRPO and, with two different clips, of DAPO.

    r = exp(clip(l - l_old, ±20)),   L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
    and with a dual clip c, where A < 0:   L = min(-A c, L).

    Args:
        log_probs: l, log-probability of each sampled token under the policy in training, nats.
        old_log_probs: l_old, the same under the policy that the ratio starts from.
        advantages: A, one per row or one per token.
        mask: 1 (True) where the token is trained on.
        clip_low: how far below 1 a smaller ratio still lowers the loss; 1 or more: no limit.
        clip_high: how far above 1 a larger ratio still lowers the loss.
        dual_clip: c > 1, the bound on the ratio of a disadvantageous token; None: no bound.
        aggregation: how tokens are averaged, see `aggregate`.
        normalizer: see `aggregate`.
        weights: factor on each token's loss, after clipping; see `rollout_correction`.

    Returns:
        Loss. Metrics: `tokens`, `approx_kl` (of -(l - l_old)), `ratio`, `clip_fraction_low` and
        `clip_fraction_high` (tokens that lose their gradient to clip(r): A < 0 and r below the
        range, A > 0 and r above it), `clip_fraction_dual` (tokens that lose it to the dual clip).

    Raises:
        ValueError: shapes disagree, a clip is negative, `dual_clip` <= 1, `normalizer` <= 0 or the
            aggregation is unknown.

    Example:
        >>> log_probs = jnp.log(jnp.array([[0.5, 0.25]]))
        >>> old_log_probs = jnp.log(jnp.array([[0.25, 0.25]]))
        >>> loss = clipped_policy_loss(log_probs, old_log_probs, jnp.ones(1), jnp.ones((1, 2)))
        >>> f"{mean(loss):.2f}"  # ratios 2 and 1, the first clipped at 1.28
        '-1.14'

    Source:
        PPO, arXiv 1707.06347; GRPO, arXiv 2402.03300; DAPO, arXiv 2503.14476, section 3.1;
        dual clip, arXiv 1912.09729.
    """
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}; allowed: a number > 1, or None")
    tokens = _policy_tokens(log_probs, old_log_probs, advantages, mask, weights)
    log_ratio = _bounded(tokens.log_probs - tokens.old_log_probs)
    ratio = jnp.exp(log_ratio)
    effective, low, high = _clip_gains(ratio, tokens.advantages, clip_low, clip_high)
    # A negative advantage makes min(-A c, L) a bound on the ratio: -A min(c, effective).
    bound = jnp.inf if dual_clip is None else dual_clip
    dual = (tokens.advantages < 0) & (effective > bound)
    effective = jnp.where(dual, bound, effective)
    metrics = _policy_metrics(log_ratio, ratio, low, high, tokens.trained)
    metrics["clip_fraction_dual"] = _count(dual & tokens.trained)
    return _reduce(
        -tokens.advantages * effective * tokens.weights, mask, aggregation, normalizer, metrics
    )


def gspo_loss(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    weights: Float[Array, "B T"] | None = None,
) -> Loss:
    """Clipped surrogate with one ratio per sequence, the geometric mean of its tokens' ratios.

    s = mean_t(l - l_old) over the row's trained tokens,   rho_t = exp(min(l - sg(l) + sg(s), 10)),
    L = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)),   sg: no gradient.

    Every token has the value of its sequence's ratio and the gradient rho ∇l of its own
    log-probability. Averaged over tokens, then over rows (`seq-mean-token-mean`), always.

    Args:
        log_probs: l, log-probability of each sampled token under the policy in training, nats.
        old_log_probs: l_old, the same under the policy that the ratio starts from.
        advantages: A, one per row or one per token.
        mask: 1 (True) where the token is trained on.
        clip_low: as in `clipped_policy_loss`; sequence ratios stay far closer to 1 than tokens' do.
        clip_high: likewise.
        weights: factor on each token's loss, after clipping; see `rollout_correction`.

    Returns:
        Loss. Metrics as in `clipped_policy_loss`, without `clip_fraction_dual`; every token of a
        row counts with the row's ratio.

    Raises:
        ValueError: shapes disagree or a clip is negative.

    Source:
        GSPO, arXiv 2507.18071, section 4 (the token form: section 4.3).
    """
    _check_clips(clip_low, clip_high)
    tokens = _policy_tokens(log_probs, old_log_probs, advantages, mask, weights)
    log_ratio = tokens.log_probs - tokens.old_log_probs
    row_means = log_ratio.sum(axis=1, keepdims=True) / _row_tokens(tokens.trained)
    sequence = jax.lax.stop_gradient(row_means)
    own = tokens.log_probs - jax.lax.stop_gradient(tokens.log_probs)
    ratio = jnp.exp(jnp.minimum(own + sequence, _GSPO_LOG_RATIO_MAX))
    effective, low, high = _clip_gains(ratio, tokens.advantages, clip_low, clip_high)
    metrics = _policy_metrics(log_ratio, ratio, low, high, tokens.trained)
    losses = -tokens.advantages * effective * tokens.weights
    return _reduce(losses, mask, "seq-mean-token-mean", None, metrics)


def cispo_loss(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    aggregation: Aggregation = "token-mean",
    normalizer: float | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> Loss:
    """REINFORCE with a clipped importance weight: bounded, and no token loses its gradient.

    r = exp(clip(l - l_old, ±20)),   L = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A l,
    sg: no gradient. The value has no meaning of its own; its gradient has.

    Args:
        log_probs: l, log-probability of each sampled token under the policy in training, nats.
        old_log_probs: l_old, the same under the policy that the ratio starts from.
        advantages: A, one per row or one per token.
        mask: 1 (True) where the token is trained on.
        clip_low: how far below 1 the weight may go; 1 or more (the paper's choice): no limit.
        clip_high: how far above 1 the weight may go.
        aggregation: how tokens are averaged, see `aggregate`.
        normalizer: see `aggregate`.
        weights: further factor on each token's loss; see `rollout_correction`.

    Returns:
        Loss. Metrics as in `clipped_policy_loss`, without `clip_fraction_dual`; here the clip
        fractions count every ratio outside the range, because the weight is clipped for either
        sign of the advantage.

    Raises:
        ValueError: shapes disagree, a clip is negative, `normalizer` <= 0 or the aggregation is
            unknown.

    Source:
        CISPO in MiniMax-M1, arXiv 2506.13585, section 3.1.
    """
    _check_clips(clip_low, clip_high)
    tokens = _policy_tokens(log_probs, old_log_probs, advantages, mask, weights)
    log_ratio = _bounded(tokens.log_probs - tokens.old_log_probs)
    ratio = jnp.exp(log_ratio)
    clipped = jax.lax.stop_gradient(jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
    metrics = _policy_metrics(
        log_ratio, ratio, ratio < 1 - clip_low, ratio > 1 + clip_high, tokens.trained
    )
    losses = -clipped * tokens.advantages * tokens.log_probs * tokens.weights
    return _reduce(losses, mask, aggregation, normalizer, metrics)


def negative_log_likelihood(
    log_probs: Float[Array, "B T"],
    mask: Mask,
    *,
    aggregation: Aggregation = "token-mean",
    normalizer: float | None = None,
) -> Loss:
    """Cross-entropy to the sampled tokens: L = -l. For supervised and MTP training.

    Args:
        log_probs: l, log-probability of each token, nats.
        mask: 1 (True) where the token is trained on.
        aggregation: how tokens are averaged, see `aggregate`.
        normalizer: see `aggregate`.

    Returns:
        Loss. Metrics: `tokens`.

    Raises:
        ValueError: shapes disagree, `normalizer` <= 0 or the aggregation is unknown.
    """
    _check_rows("log_probs", log_probs)
    _check_shape("mask", mask, log_probs.shape)
    metrics = {"tokens": _count(mask.astype(bool))}
    return _reduce(-log_probs.astype(jnp.float32), mask, aggregation, normalizer, metrics)


def rollout_correction(
    old_log_probs: Float[Array, "B T"], rollout_log_probs: Float[Array, "B T"], *, cap: float = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance weights from the sampler's distribution to the trainer's.

    w = min(exp(clip(l_old - l_rollout, ±20)), cap), for the `weights` of a policy loss.

    Args:
        old_log_probs: log-probability of each token as the trainer computed it, nats.
        rollout_log_probs: the same as the sampler computed it.
        cap: the largest weight, > 0.

    Returns:
        Weights, float32, without gradient.

    Raises:
        ValueError: shapes disagree or `cap` <= 0.

    Source:
        Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
        2025 (truncated importance sampling).
    """
    _check_shape("rollout_log_probs", rollout_log_probs, old_log_probs.shape)
    if not cap > 0:
        raise ValueError(f"cap={cap}; allowed: a number > 0")
    difference = old_log_probs.astype(jnp.float32) - rollout_log_probs.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(_bounded(difference)), cap))


def kl_penalty(
    log_probs: Float[Array, "B T"],
    reference_log_probs: Float[Array, "B T"],
    kind: Literal["k1", "k2", "k3"] = "k3",
    *,
    mask: Mask | None = None,
) -> Float[Array, "B T"]:
    """Per-token estimates of KL(policy || reference) from tokens that the policy sampled.

    k1 = l - l_ref;   k2 = (l - l_ref)² / 2;   k3 = min(e^d - d - 1, 10), d = clip(l_ref - l, ±20).

    k1 and k3 are unbiased (k3 up to its clips), k3 is never negative. As a loss k2 is the one whose
    gradient is that of the KL; the mean gradient of k1 is zero.

    Args:
        log_probs: l, log-probability of each sampled token under the policy, nats.
        reference_log_probs: l_ref, the same under the reference. No gradient.
        kind: the estimator.
        mask: where given, the penalty is 0 wherever the mask is, without gradient. Needed only if
            there may be NaN or infinities there: `aggregate`, applied later, can keep them out of
            the value but no longer out of the gradient.

    Returns:
        Penalties, float32, nats.

    Raises:
        ValueError: `kind` is unknown or shapes disagree.

    Source:
        J. Schulman, "Approximating KL divergence", 2020.
    """
    _check_shape("reference_log_probs", reference_log_probs, log_probs.shape)
    if mask is not None:
        _check_shape("mask", mask, log_probs.shape)
        log_probs = _zero_outside(mask.astype(bool), log_probs)
        reference_log_probs = _zero_outside(mask.astype(bool), reference_log_probs)
    reference = jax.lax.stop_gradient(reference_log_probs).astype(jnp.float32)
    difference = log_probs.astype(jnp.float32) - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * jnp.square(difference)
    if kind == "k3":
        difference = _bounded(-difference)
        # expm1, since e^d - 1 - d cancels to noise, of either sign, near the reference.
        return jnp.minimum(jnp.expm1(difference) - difference, _K3_BOUND)
    raise ValueError(f"kind={kind!r}; allowed: k1, k2, k3")


def aggregate(
    values: Float[Array, "B T"],
    mask: Mask,
    aggregation: Aggregation,
    normalizer: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums token values in one of four ways; the aggregate is sum / denominator.

    token-mean:               Σ_bt m v                    over Σ_bt m
    seq-mean-token-mean:      Σ_b (Σ_t m v / Σ_t m)       over the number of rows
    seq-mean-token-sum:       Σ_b (Σ_t m v)               over the number of rows
    seq-mean-token-sum-norm:  Σ_b (Σ_t m v / normalizer)  over the number of rows

    A row without a trained token is not a sequence: it counts neither in the sum nor in the rows.

    Args:
        values: one value per token.
        mask: 1 (True) where the token counts.
        aggregation: one of `AGGREGATIONS`.
        normalizer: the constant of seq-mean-token-sum-norm, tokens; None: T. T is that of *this*
            array, so give the constant where arrays of several lengths are to be added. The other
            aggregations do not read it.

    Returns:
        (sum, denominator), float32. Both are additive over micro-batches and shards.

    Raises:
        ValueError: shapes disagree, `normalizer` <= 0 or the aggregation is unknown.

    Source:
        token-mean, DAPO, arXiv 2503.14476, section 3.3; the constant, Dr. GRPO,
        arXiv 2503.20783, section 3.2.
    """
    _check_rows("values", values)
    _check_shape("mask", mask, values.shape)
    denominator = aggregation_denominator(mask, aggregation)
    trained = mask.astype(bool)
    row_sums = _zero_outside(trained, values).sum(axis=1, keepdims=True)
    if aggregation == "seq-mean-token-mean":
        row_sums = row_sums / _row_tokens(trained)
    elif aggregation == "seq-mean-token-sum-norm":
        length = values.shape[1] if normalizer is None else normalizer
        if not length > 0:
            raise ValueError(f"normalizer={length}; allowed: a number of tokens > 0, or None")
        row_sums = row_sums / length
    return row_sums.sum(), denominator


def aggregation_denominator(mask: Mask, aggregation: Aggregation) -> Float[Array, ""]:
    """The denominator of `aggregate` alone: trained tokens, or rows with at least one.

    A mini-batch computes it once, before it is split; over micro-batches of whole rows it adds up
    to the same.

    Args:
        mask: 1 (True) where the token counts.
        aggregation: one of `AGGREGATIONS`.

    Returns:
        The count, float32. It may be 0.

    Raises:
        ValueError: the mask is not two-dimensional or the aggregation is unknown.
    """
    _check_rows("mask", mask)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}; allowed: {', '.join(AGGREGATIONS)}")
    trained = mask.astype(bool)
    return _count(trained if aggregation == "token-mean" else trained.any(axis=1))


class _PolicyTokens(NamedTuple):
    """The inputs of a policy loss: checked, float32, zero wherever nothing is trained on."""

    trained: Bool[Array, "B T"]
    log_probs: Float[Array, "B T"]
    old_log_probs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    weights: Float[Array, "B T"]


def _policy_tokens(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantages: Float[Array, "B"] | Float[Array, "B T"],
    mask: Mask,
    weights: Float[Array, "B T"] | None,
) -> _PolicyTokens:
    _check_rows("log_probs", log_probs)
    shape = log_probs.shape
    _check_shape("old_log_probs", old_log_probs, shape)
    _check_shape("mask", mask, shape)
    if advantages.shape not in (shape[:1], shape):
        raise ValueError(
            f"advantages has shape {advantages.shape}; allowed: {shape[:1]}, one a row, "
            f"or {shape}, one a token"
        )
    trained = mask.astype(bool)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], shape)
    if weights is None:
        weights = trained.astype(jnp.float32)
    _check_shape("weights", weights, shape)
    # Before any arithmetic: a NaN selected away afterwards would return as 0 * NaN in the gradient.
    return _PolicyTokens(
        trained=trained,
        log_probs=_zero_outside(trained, log_probs),
        old_log_probs=jax.lax.stop_gradient(_zero_outside(trained, old_log_probs)),
        advantages=jax.lax.stop_gradient(_zero_outside(trained, advantages)),
        weights=jax.lax.stop_gradient(_zero_outside(trained, weights)),
    )


def _clip_gains(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"], clip_low: float, clip_high: float
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """The ratio that enters -A r, and where it was held at the low and the high end."""
    # max(-A r, -A clip(r)) is -A times this, since only the end on the gaining side can be the
    # larger. Selecting, instead of max and clip, leaves no ties for the gradient to be split at:
    # it is whole at r = 1 for every clip, 0 included.
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)
    return jnp.where(low, 1 - clip_low, jnp.where(high, 1 + clip_high, ratio)), low, high


def _policy_metrics(
    log_ratio: Float[Array, "B T"],
    ratio: Float[Array, "B T"],
    low: Bool[Array, "B T"],
    high: Bool[Array, "B T"],
    trained: Bool[Array, "B T"],
) -> dict[str, Float[Array, ""]]:
    return {
        "tokens": _count(trained),
        "approx_kl": _token_sum(-log_ratio, trained),
        "ratio": _token_sum(ratio, trained),
        "clip_fraction_low": _count(low & trained),
        "clip_fraction_high": _count(high & trained),
    }


def _reduce(
    values: Float[Array, "B T"],
    mask: Mask,
    aggregation: Aggregation,
    normalizer: float | None,
    metrics: dict[str, Float[Array, ""]],
) -> Loss:
    total, denominator = aggregate(values, mask, aggregation, normalizer)
    return Loss(total, denominator, metrics)


def _bounded(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.clip(log_ratio, -_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)


def _zero_outside(trained: Bool[Array, "B T"], values: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.where(trained, values.astype(jnp.float32), 0.0)


def _token_sum(values: Float[Array, "B T"], trained: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(_zero_outside(trained, values).sum())


def _row_tokens(trained: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """Trained tokens of each row, at least 1: a divisor for sums that are 0 where it is wrong."""
    return jnp.maximum(trained.sum(axis=1, keepdims=True), 1).astype(jnp.float32)


def _count(selected: Bool[Array, "..."]) -> Float[Array, ""]:
    # Counted as integers: float32 additions would stop counting at 2^24 tokens.
    return selected.sum().astype(jnp.float32)


def _check_clips(clip_low: float, clip_high: float) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{name}={value}; allowed: a number >= 0")


def _check_rows(name: str, array: Array) -> None:
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}; allowed: [B, T], rows by tokens")


def _check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; allowed: {shape}, one shape for all")
