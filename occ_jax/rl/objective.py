# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false
"""What every head contributes: the main head's objective, the modules' two kinds of loss.

Everything here is a function of states or of log-probabilities; where gradients stop, and how the
pieces are weighted, is decided in `gradients.py`. Losses come divided by the denominator of the
whole mini-batch, so that micro-batches add up to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.calibration.estimators import released_code_coefficient
from occ_jax.config import AlgorithmConfig, Config
from occ_jax.models.model import Model
from occ_jax.models.scoring import (
    TokenScores,
    auxiliary_masks,
    auxiliary_states,
    distillation_losses,
    score_tokens,
)
from occ_jax.rl.losses import (
    Loss,
    aggregate,
    aggregation_denominator,
    cispo_loss,
    clipped_policy_loss,
    gspo_loss,
    kl_penalty,
    negative_log_likelihood,
)
from occ_jax.types import Batch, Params


class Denominators(NamedTuple):
    """What the losses of one mini-batch are divided by, at least 1 so that empty ones give 0."""

    main: Float[Array, ""]
    auxiliary: Float[Array, " K"]  # of each module's own tokens


class MainOutput(NamedTuple):
    """The main head, without gradient."""

    hidden: Float[Array, "B R D"]  # of the response columns
    scores: TokenScores  # at the sampling temperature
    metrics: dict[str, Float[Array, ""]]  # sums over trained tokens


class HeadMetrics(NamedTuple):
    """How well the modules draft; sums over their own tokens."""

    tokens: Float[Array, " K"]
    cross_entropy: Float[Array, " K"]  # nats, of the sampled tokens
    agreement: Float[Array, " K"]  # most probable token = the main head's: greedy acceptance


def mini_batch_denominators(config: Config, batch: Batch, depth: int) -> Denominators:
    """Denominators of a mini-batch before it is split."""
    masks = auxiliary_masks(batch.valid, batch.response_mask, depth) if depth else []
    aggregation = config.algorithm.aggregation
    counts = [aggregation_denominator(mask, aggregation) for mask in [batch.response_mask, *masks]]
    at_least_one = jnp.maximum(jnp.stack(counts), 1.0)
    return Denominators(at_least_one[0], at_least_one[1:])


def policy_loss(
    algorithm: AlgorithmConfig,
    log_probs: Float[Array, "B R"],
    old_log_probs: Float[Array, "B R"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B R"],
    weights: Float[Array, "B R"] | None,
) -> Loss:
    """The configured policy loss, for the main head and the modules alike."""
    arrays = (log_probs, old_log_probs, advantages, mask)
    options: dict[str, Any] = {
        "clip_low": algorithm.clip_low,
        "clip_high": algorithm.clip_high,
        "weights": weights,
    }
    aggregation = algorithm.aggregation
    match algorithm.policy_loss:
        case "clipped":
            dual_clip = algorithm.dual_clip
            return clipped_policy_loss(
                *arrays, **options, dual_clip=dual_clip, aggregation=aggregation
            )
        case "gspo":
            return gspo_loss(*arrays, **options)
        case "cispo":
            return cispo_loss(*arrays, **options, aggregation=aggregation)


def main_loss(
    model: Model,
    config: Config,
    theta: Params,
    hidden: Float[Array, "B columns D"],
    batch: Batch,
    denominators: Denominators,
) -> tuple[Float[Array, ""], MainOutput]:
    """L_RL = policy loss + KL coefficient * KL - entropy coefficient * entropy."""
    algorithm, mask = config.algorithm, batch.response_mask
    response = mask.shape[1]
    hidden, targets = hidden[:, -response:], batch.tokens[:, -response:]
    scores = score_tokens(model, theta, hidden, targets, config.rollout.temperature)
    log_probs, entropies, _ = scores
    old, weights = batch.old_log_probs, batch.weights
    loss = policy_loss(algorithm, log_probs, old, batch.advantages, mask, weights)
    total, metrics = loss.sum, dict(loss.metrics)
    metrics["entropy"] = jnp.sum(jnp.where(mask, entropies, 0.0))
    if algorithm.entropy_coefficient > 0:
        total -= (
            algorithm.entropy_coefficient * aggregate(entropies, mask, algorithm.aggregation)[0]
        )
    if batch.reference_log_probs is not None:
        penalty = kl_penalty(
            log_probs, batch.reference_log_probs, algorithm.kl_estimator, mask=mask
        )
        metrics["reference_kl"] = jnp.sum(jnp.where(mask, penalty, 0.0))
        total += algorithm.kl_coefficient * aggregate(penalty, mask, algorithm.aggregation)[0]
    output = MainOutput(hidden, scores, metrics)
    return total / denominators.main, jax.lax.stop_gradient(output)


def module_states(
    model: Model, params: Params, mtp_input: Float[Array, "B columns D"], batch: Batch
) -> Float[Array, "K B R D"]:
    """Every module's states for the response columns."""
    response = batch.response_mask.shape[1]
    states = auxiliary_states(model, params, mtp_input, batch.tokens, batch.valid, response)
    return jnp.stack(states)


def module_scores(
    model: Model, config: Config, theta: Params, states: Float[Array, "K B R D"], batch: Batch
) -> tuple[Float[Array, "K B R"], Int[Array, "K B R"]]:
    """Every module's log-probabilities of the response tokens, and its most probable ones."""
    targets = batch.tokens[:, -batch.response_mask.shape[1] :]
    scores = [
        score_tokens(model, theta, state, targets, config.rollout.temperature) for state in states
    ]
    return jnp.stack([x.log_probs for x in scores]), jnp.stack([x.best for x in scores])


def auxiliary_losses(
    config: Config,
    log_probs: Float[Array, "K B R"],
    batch: Batch,
    denominators: Denominators,
    main_log_probs: Float[Array, "B R"],
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """L_aux,k, what the trunk is trained on through module k, before its coefficient.

    The second result is the coefficient that is inside the losses already: the released code's,
    and ones for every other estimator.
    """
    if config.mtp.regime == "ce":
        losses, coefficient = _cross_entropies(config, log_probs, batch), jnp.ones(len(log_probs))
    else:
        coefficient = _advantage_coefficient(config, log_probs, batch, main_log_probs)
        losses = _policy_losses(config, log_probs, batch, coefficient)
    return jnp.stack(losses) / denominators.auxiliary, coefficient


def head_losses(
    config: Config,
    log_probs: Float[Array, "K B R"],
    batch: Batch,
    denominators: Denominators,
    main: MainOutput,
) -> Float[Array, " K"]:
    """L_head,k, what module k's own parameters minimise, for head losses ce and policy."""
    if config.mtp.head_loss == "ce":
        losses = _cross_entropies(config, log_probs, batch)
    else:
        coefficient = _advantage_coefficient(config, log_probs, batch, main.scores.log_probs)
        losses = _policy_losses(config, log_probs, batch, coefficient)
    return jnp.stack(losses) / denominators.auxiliary


def head_distillation(
    model: Model,
    config: Config,
    theta: Params,
    states: Float[Array, "K B R D"],
    batch: Batch,
    denominators: Denominators,
    main: MainOutput,
) -> Float[Array, " K"]:
    """L_head,k for head loss distill: soft cross-entropy to the main head's distribution."""
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(states))
    temperature, aggregation = config.rollout.temperature, config.algorithm.aggregation
    losses = [
        aggregate(
            distillation_losses(model, theta, main.hidden, state, temperature), mask, aggregation
        )[0]
        for state, mask in zip(states, masks, strict=True)
    ]
    return jnp.stack(losses) / denominators.auxiliary


def head_metrics(
    log_probs: Float[Array, "K B R"], best: Int[Array, "K B R"], batch: Batch, main: MainOutput
) -> HeadMetrics:
    """Cross-entropy and agreement of every module, summed over its own tokens."""
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(log_probs))
    agree = best == main.scores.best[None]
    return HeadMetrics(
        tokens=jnp.sum(masks, axis=(1, 2), dtype=jnp.float32),
        cross_entropy=jnp.sum(jnp.where(masks, -log_probs, 0.0), axis=(1, 2)),
        agreement=jnp.sum(masks & agree, axis=(1, 2), dtype=jnp.float32),
    )


def auxiliary_delta(
    config: Config, log_probs: Float[Array, "K B R"], batch: Batch
) -> Float[Array, "K B R"]:
    """Change of each module's log-probabilities since the rollout (`mtp.auxiliary_ratio`)."""
    return log_probs - _old_auxiliary_log_probs(config, batch)


def _old_auxiliary_log_probs(config: Config, batch: Batch) -> Float[Array, "K B R"]:
    """Denominator of each module's importance ratio: its own old log-probs or the main head's."""
    if config.mtp.auxiliary_ratio == "own":
        assert batch.old_auxiliary_log_probs is not None, "the rollout did not score the modules"
        return batch.old_auxiliary_log_probs
    depth = config.model.num_mtp_modules
    return jnp.broadcast_to(batch.old_log_probs, (depth, *batch.old_log_probs.shape))


def _cross_entropies(
    config: Config, log_probs: Float[Array, "K B R"], batch: Batch
) -> list[Float[Array, ""]]:
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(log_probs))
    aggregation = config.algorithm.aggregation
    return [
        negative_log_likelihood(values, mask, aggregation=aggregation).sum
        for values, mask in zip(log_probs, masks, strict=True)
    ]


def _policy_losses(
    config: Config,
    log_probs: Float[Array, "K B R"],
    batch: Batch,
    coefficient: Float[Array, " K"],
) -> list[Float[Array, ""]]:
    """The RL objective on the modules' log-probabilities; the coefficient scales advantages."""
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(log_probs))
    old = _old_auxiliary_log_probs(config, batch)
    return [
        policy_loss(
            config.algorithm,
            log_probs[k],
            old[k],
            batch.advantages * coefficient[k],
            masks[k],
            batch.weights,
        ).sum
        for k in range(len(log_probs))
    ]


def _advantage_coefficient(
    config: Config, log_probs: Float[Array, "K B R"], batch: Batch, main_log_probs: Array
) -> Float[Array, " K"]:
    """Ones; with estimator `released` the coefficient that its authors fold into the advantage.

    Padding takes part in their mean. It holds no sampled token, so nothing there has changed since
    the rollout: both deltas are set to 0.
    """
    if config.mtp.regime != "occ" or config.mtp.estimator != "released":
        return jnp.ones(len(log_probs))
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(log_probs))
    delta = jnp.where(batch.response_mask, main_log_probs - batch.old_log_probs, 0.0)
    auxiliary = jnp.where(masks, log_probs - batch.old_log_probs[None], 0.0)
    coefficient = released_code_coefficient(delta, auxiliary, config.mtp.released_factor)
    return jax.lax.stop_gradient(coefficient)
