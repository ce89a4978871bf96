# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false
"""What every head contributes: the main head's objective, the modules' two kinds of loss.

Everything here is a function of trunk states or logits; where gradients stop, and how the pieces
are weighted, is decided in `gradients.py`. Losses come divided by the denominator of the whole
mini-batch, so that micro-batches add up to it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from occ_jax.config import AlgorithmConfig, Config
from occ_jax.estimators import released_code_coefficient
from occ_jax.models.model import Model
from occ_jax.models.scoring import auxiliary_masks, auxiliary_states, token_log_probs
from occ_jax.rl.losses import (
    Loss,
    aggregate,
    aggregation_denominator,
    cispo_loss,
    clipped_policy_loss,
    distillation_loss,
    entropy,
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

    logits: Float[Array, "B R V"]  # at the sampling temperature
    log_probs: Float[Array, "B R"]
    metrics: dict[str, Float[Array, ""]]  # sums over trained tokens


class AuxiliaryOutput(NamedTuple):
    """The modules as the trunk is trained through them, without gradient."""

    log_probs: Float[Array, "K B R"]
    coefficient: Float[Array, " K"]  # the released code's, ones for every other estimator


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
) -> Loss:
    """The configured policy loss, for the main head and the modules alike."""
    low, high, aggregation = algorithm.clip_low, algorithm.clip_high, algorithm.aggregation
    match algorithm.policy_loss:
        case "clipped":
            return clipped_policy_loss(
                log_probs,
                old_log_probs,
                advantages,
                mask,
                clip_low=low,
                clip_high=high,
                dual_clip=algorithm.dual_clip,
                aggregation=aggregation,
            )
        case "gspo":
            return gspo_loss(
                log_probs, old_log_probs, advantages, mask, clip_low=low, clip_high=high
            )
        case "cispo":
            return cispo_loss(
                log_probs,
                old_log_probs,
                advantages,
                mask,
                clip_low=low,
                clip_high=high,
                aggregation=aggregation,
            )


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
    logits = model.logits(theta, hidden[:, -response:]) / config.rollout.temperature
    log_probs = token_log_probs(logits, batch.tokens[:, -response:])
    loss = policy_loss(algorithm, log_probs, batch.old_log_probs, batch.advantages, mask)
    total, metrics = loss.sum, dict(loss.metrics)
    entropies = entropy(logits)
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
    output = MainOutput(logits, log_probs, metrics)
    return total / denominators.main, jax.lax.stop_gradient(output)


def auxiliary_logits(
    model: Model,
    config: Config,
    params: Params,
    mtp_input: Float[Array, "B columns D"],
    batch: Batch,
) -> list[Array]:
    """Every module's logits of the response tokens at the sampling temperature, K x [B, R, V]."""
    response = batch.response_mask.shape[1]
    states = auxiliary_states(model, params, mtp_input, batch.tokens, batch.valid, response)
    return [model.logits(params["trunk"], s) / config.rollout.temperature for s in states]


def auxiliary_losses(
    config: Config,
    logits: list[Array],
    batch: Batch,
    denominators: Denominators,
    main_log_probs: Float[Array, "B R"],
) -> tuple[Float[Array, " K"], AuxiliaryOutput]:
    """L_aux,k, what the trunk is trained on through module k, before its coefficient."""
    log_probs = _target_log_probs(logits, batch)
    if config.mtp.regime == "ce":
        losses = _cross_entropies(config, log_probs, batch)
        coefficient = jnp.ones(len(losses))
    else:
        coefficient = _advantage_coefficient(config, log_probs, batch, main_log_probs)
        losses = _policy_losses(config, log_probs, batch, coefficient)
    output = AuxiliaryOutput(log_probs, coefficient)
    return jnp.stack(losses) / denominators.auxiliary, jax.lax.stop_gradient(output)


def head_losses(
    config: Config,
    logits: list[Array],
    batch: Batch,
    denominators: Denominators,
    main: MainOutput,
) -> tuple[Float[Array, " K"], HeadMetrics]:
    """L_head,k, what module k's own parameters minimise."""
    log_probs = _target_log_probs(logits, batch)
    masks = auxiliary_masks(batch.valid, batch.response_mask, len(logits))
    match config.mtp.head_loss:
        case "ce":
            losses = _cross_entropies(config, log_probs, batch)
        case "distill":
            aggregation = config.algorithm.aggregation
            losses = [
                distillation_loss(main.logits, student, mask, aggregation=aggregation).sum
                for student, mask in zip(logits, masks, strict=True)
            ]
        case "policy":
            coefficient = _advantage_coefficient(config, log_probs, batch, main.log_probs)
            losses = _policy_losses(config, log_probs, batch, coefficient)
    agree = jnp.argmax(jnp.stack(logits), axis=-1) == jnp.argmax(main.logits, axis=-1)[None]
    metrics = HeadMetrics(
        tokens=jnp.sum(masks, axis=(1, 2), dtype=jnp.float32),
        cross_entropy=jnp.sum(jnp.where(masks, -log_probs, 0.0), axis=(1, 2)),
        agreement=jnp.sum(masks & agree, axis=(1, 2), dtype=jnp.float32),
    )
    return jnp.stack(losses) / denominators.auxiliary, jax.lax.stop_gradient(metrics)


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


def _target_log_probs(logits: list[Array], batch: Batch) -> Float[Array, "K B R"]:
    targets = batch.tokens[:, -batch.response_mask.shape[1] :]
    return jnp.stack([token_log_probs(x, targets) for x in logits])


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
            config.algorithm, log_probs[k], old[k], batch.advantages * coefficient[k], masks[k]
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
