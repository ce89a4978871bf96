"""From a scored rollout to mini-batches: advantages, old and reference log-probabilities.

One pure function of device arrays. Rewards come from outside; what a mini-batch is trained on is
left to `occ_jax.rl.train_step`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from occ_jax.config import Config
from occ_jax.models.model import Model
from occ_jax.models.responses import auxiliary_states, score_tokens, trunk_states
from occ_jax.parallel.sharding import micro_batches
from occ_jax.rl.advantages import group_advantages, rloo_advantages
from occ_jax.rl.losses import rollout_correction
from occ_jax.rl.regime import scores_modules
from occ_jax.types import Batch, Params, Rollout, map_rows


def split_rollout(
    model: Model,
    config: Config,
    params: Params,
    reference: Params | None,
    rollout: Rollout,
    rewards: Float[Array, "P G"],
) -> list[Batch]:
    """Computes advantages and cuts a rollout into `algorithm.updates_per_rollout` mini-batches.

    Args:
        model: the architecture.
        config: sections rollout, algorithm and mtp.
        params: the policy; with `rollout.old_log_probs` trainer it scores the rollout again.
        reference: trunk parameters of the KL penalty's reference, or None.
        rollout: B = P G rows; rows of one prompt are neighbours, so no group is split.
        rewards: float32, one a completion.
    """
    temperature = config.rollout.temperature
    updates = config.algorithm.updates_per_rollout
    pieces = updates * config.algorithm.micro_batches

    def score(
        params: Params, *, modules: bool
    ) -> tuple[Float[Array, "B R"], Float[Array, "K B R"] | None]:
        """Scores the rollout in pieces of a micro-batch, for which an update has memory."""
        main, heads = jax.lax.map(
            lambda piece: _score(model, params, piece, temperature, modules=modules),
            micro_batches(rollout, pieces),
        )
        if heads is not None:
            heads = jnp.moveaxis(heads, 1, 0)
            heads = heads.reshape(heads.shape[0], -1, heads.shape[-1])
        return main.reshape(-1, main.shape[-1]), heads

    old, auxiliary = rollout.log_probs, rollout.auxiliary_log_probs
    if config.rollout.old_log_probs == "trainer":
        old, auxiliary = score(params, modules=scores_modules(config))
    cap, weights = config.algorithm.rollout_correction_cap, None
    if cap is not None:
        weights = rollout_correction(old, rollout.log_probs, cap=cap)
    reference_log_probs = None
    if reference is not None:
        reference_log_probs, _ = score({"trunk": reference}, modules=False)
    whole = Batch(
        tokens=rollout.tokens,
        valid=rollout.valid,
        response_mask=rollout.response_mask,
        old_log_probs=old,
        old_auxiliary_log_probs=auxiliary,
        reference_log_probs=reference_log_probs,
        weights=weights,
        advantages=_advantages(config, rewards).reshape(-1),
    )
    size = whole.advantages.shape[0] // updates

    def cut(x: Array, axis: int, number: int) -> Array:
        return jax.lax.slice_in_dim(x, number * size, (number + 1) * size, axis=axis)

    return [map_rows(functools.partial(cut, number=number), whole) for number in range(updates)]


def replace_rows(kept: Rollout, new: Rollout, source: Int[Array, " B"]) -> Rollout:
    """Takes row `source[i]` of `new` as row i, or row i of `kept` where `source[i]` is negative."""

    def pick(old: Array, new: Array, axis: int) -> Array:
        shape = [1] * old.ndim
        shape[axis] = -1
        rows = jnp.take(new, jnp.maximum(source, 0), axis=axis)
        return jnp.where((source < 0).reshape(shape), old, rows)

    axes = map_rows(lambda _, axis: axis, kept)
    return jax.tree.map(lambda axis, old, new: pick(old, new, axis), axes, kept, new)


def _advantages(config: Config, rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    match config.algorithm.advantage:
        case "group":
            return group_advantages(rewards)
        case "group_mean":
            return group_advantages(rewards, normalize_std=False)
        case "rloo":
            return rloo_advantages(rewards)


def _score(
    model: Model, params: Params, rollout: Rollout, temperature: float, *, modules: bool
) -> tuple[Float[Array, "B R"], Float[Array, "K B R"] | None]:
    """Log-probabilities of the sampled tokens by the trainer's own forward pass."""
    response = rollout.response_mask.shape[1]
    theta, targets = params["trunk"], rollout.tokens[:, -response:]
    states = trunk_states(model, theta, rollout.tokens, rollout.valid)

    def log_probs(hidden: Array) -> Array:
        return score_tokens(model, theta, hidden, targets, temperature).log_probs

    main = log_probs(states.hidden[:, -response:])
    if not modules:
        return main, None
    heads = auxiliary_states(
        model, params, states.mtp_input, rollout.tokens, rollout.valid, response
    )
    return main, jnp.stack([log_probs(head) for head in heads])
