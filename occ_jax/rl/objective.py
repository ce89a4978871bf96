"""Losses of the main head and of the modules, and the metrics of each.

Everything here is a function of states or of log-probabilities; `gradients` decides where gradients
stop and how losses are weighted, `regime` which loss of a module trains the trunk. Losses come
divided by the denominator of the whole mini-batch, so that micro-batches add up to it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import AlgorithmConfig, Config
from occ_jax.models.model import Model
from occ_jax.models.responses import (
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
from occ_jax.rl.regime import LogProbChanges
from occ_jax.types import Batch, Params


class Denominators(NamedTuple):
    """Divisors of the losses of one mini-batch, at least 1 so that losses of no tokens are 0."""

    main: Float[Array, ""]
    auxiliary: Float[Array, " K"]  # of each module's own tokens


class MainMetrics(NamedTuple):
    """Values of the main head; they add up over micro-batches."""

    loss: Float[Array, ""]  # L_RL, the KL and entropy terms included
    policy_loss: Float[Array, ""]  # without these terms
    token_sums: dict[str, Float[Array, ""]]  # over trained tokens


class MainOutput(NamedTuple):
    """Output of the main head, without gradient."""

    hidden: Float[Array, "B R D"]  # of the response columns
    scores: TokenScores  # at the sampling temperature
    metrics: MainMetrics


class ModuleBatch(NamedTuple):
    """A micro-batch as the losses of the modules read it."""

    batch: Batch
    masks: Bool[Array, "K B R"]  # trained tokens that module k predicts from a real token
    denominators: Float[Array, " K"]  # of the whole mini-batch


class ModuleMetrics(NamedTuple):
    """Quality of the modules' drafts; sums over their own tokens."""

    tokens: Float[Array, " K"]
    cross_entropy: Float[Array, " K"]  # nats, of the sampled tokens
    agreement: Float[Array, " K"]  # tokens on which the most probable token is the main head's


def mini_batch_denominators(config: Config, batch: Batch, depth: int) -> Denominators:
    """Denominators of a mini-batch before it is split."""
    masks = auxiliary_masks(batch.valid, batch.response_mask, depth)
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
    policy = policy_loss(algorithm, log_probs, old, batch.advantages, mask, weights)
    total, sums = policy.sum, dict(policy.metrics)
    sums["entropy"] = jnp.sum(jnp.where(mask, entropies, 0.0))
    if algorithm.entropy_coefficient > 0:
        total -= (
            algorithm.entropy_coefficient * aggregate(entropies, mask, algorithm.aggregation)[0]
        )
    if batch.reference_log_probs is not None:
        penalty = kl_penalty(
            log_probs, batch.reference_log_probs, algorithm.kl_estimator, mask=mask
        )
        sums["reference_kl"] = jnp.sum(jnp.where(mask, penalty, 0.0))
        total += algorithm.kl_coefficient * aggregate(penalty, mask, algorithm.aggregation)[0]
    loss = total / denominators.main
    metrics = MainMetrics(loss, policy.sum / denominators.main, sums)
    return loss, jax.lax.stop_gradient(MainOutput(hidden, scores, metrics))


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


def module_losses(
    config: Config,
    kind: Literal["ce", "policy"],
    log_probs: Float[Array, "K B R"],
    modules: ModuleBatch,
) -> Float[Array, " K"]:
    """Loss of every module on its log-probabilities of the sampled tokens.

    L_aux,k trains the trunk through module k, L_head,k the module's own parameters; both are one of
    these two kinds, and L_head,k may be `distillation` as well.

    Args:
        config: the policy loss and the aggregation.
        kind: cross-entropy, or the RL objective.
        log_probs: by the modules.
        modules: the micro-batch.
    """
    match kind:
        case "ce":
            aggregation = config.algorithm.aggregation
            losses = [
                negative_log_likelihood(values, mask, aggregation=aggregation).sum
                for values, mask in zip(log_probs, modules.masks, strict=True)
            ]
        case "policy":
            batch = modules.batch
            old = _old_module_log_probs(config, batch)
            losses = [
                policy_loss(
                    config.algorithm, log_probs[k], old[k], batch.advantages, mask, batch.weights
                ).sum
                for k, mask in enumerate(modules.masks)
            ]
    return jnp.stack(losses) / modules.denominators


def distillation(
    model: Model,
    config: Config,
    theta: Params,
    states: Float[Array, "K B R D"],
    teacher: Float[Array, "B R D"],
    modules: ModuleBatch,
) -> Float[Array, " K"]:
    """Soft cross-entropy of every module to the main head's distribution.

    Args:
        model: the architecture.
        config: temperature and aggregation.
        theta: the trunk, whose output head is read.
        states: of the modules.
        teacher: states of the main head, `MainOutput.hidden`.
        modules: the micro-batch.
    """
    temperature, aggregation = config.rollout.temperature, config.algorithm.aggregation
    values = [distillation_losses(model, theta, teacher, state, temperature) for state in states]
    losses = [
        aggregate(value, mask, aggregation)[0]
        for value, mask in zip(values, modules.masks, strict=True)
    ]
    return jnp.stack(losses) / modules.denominators


def module_metrics(
    log_probs: Float[Array, "K B R"],
    best: Int[Array, "K B R"],
    main: MainOutput,
    masks: Bool[Array, "K B R"],
) -> ModuleMetrics:
    """Cross-entropy and agreement of every module, summed over its own tokens."""
    agree = best == main.scores.best[None]
    return ModuleMetrics(
        tokens=jnp.sum(masks, axis=(1, 2), dtype=jnp.float32),
        cross_entropy=jnp.sum(jnp.where(masks, -log_probs, 0.0), axis=(1, 2)),
        agreement=jnp.sum(masks & agree, axis=(1, 2), dtype=jnp.float32),
    )


def log_prob_changes(
    config: Config, main: MainOutput, log_probs: Float[Array, "K B R"], modules: ModuleBatch
) -> LogProbChanges:
    """Changes of all heads' log-probabilities since the rollout (`mtp.auxiliary_ratio`)."""
    return LogProbChanges(
        main=main.scores.log_probs - modules.batch.old_log_probs,
        modules=log_probs - _old_module_log_probs(config, modules.batch),
        masks=modules.masks,
    )


def _old_module_log_probs(config: Config, batch: Batch) -> Float[Array, "K B R"]:
    """Denominator of each module's importance ratio: its own old log-probs or the main head's."""
    if config.mtp.auxiliary_ratio == "main":
        depth = config.model.num_mtp_modules
        return jnp.broadcast_to(batch.old_log_probs, (depth, *batch.old_log_probs.shape))
    if batch.old_auxiliary_log_probs is None:
        raise ValueError(
            "batch.old_auxiliary_log_probs=None; allowed: the modules' log-probabilities with "
            f"mtp.regime {config.mtp.regime}, mtp.head_loss {config.mtp.head_loss} and "
            "mtp.auxiliary_ratio own"
        )
    return batch.old_auxiliary_log_probs
