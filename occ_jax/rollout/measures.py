"""Measures of sampled or given completions: the modules' agreement, a completion's probability.

Pure functions of device arrays; records and figures are left to `occ_jax.evaluation`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.models.model import Model
from occ_jax.models.responses import auxiliary_masks, auxiliary_states, score_tokens, trunk_states
from occ_jax.parallel.sharding import micro_batches
from occ_jax.types import Params, Rollout


def agreement_counts(
    model: Model, params: Params, rollout: Rollout, pieces: int
) -> Float[Array, "B 2 K"]:
    """Counts, per row and module, the tokens that agree with the main head, and all its tokens.

    A module agrees where its most probable token is the main head's.

    Args:
        model: the architecture.
        params: trunk and modules.
        rollout: B rows, as sampled.
        pieces: parts that are computed one after the other; a divisor of B.
    """
    counts = jax.lax.map(
        lambda piece: jnp.stack(_agreement(model, params, piece)), micro_batches(rollout, pieces)
    )
    return jnp.moveaxis(counts, 3, 1).reshape(-1, *counts.shape[1:3])


def _agreement(
    model: Model, params: Params, rollout: Rollout
) -> tuple[Float[Array, "K B"], Float[Array, "K B"]]:
    depth, response = model.config.num_mtp_modules, rollout.response_mask.shape[1]
    if depth == 0:
        none = jnp.zeros((0, rollout.tokens.shape[0]))
        return none, none
    states = trunk_states(model, params["trunk"], rollout.tokens, rollout.valid)
    heads = auxiliary_states(
        model, params, states.mtp_input, rollout.tokens, rollout.valid, response
    )
    tokens = rollout.tokens[:, -response:]
    main, *drafts = (
        score_tokens(model, params["trunk"], hidden, tokens).best
        for hidden in (states.hidden[:, -response:], *heads)
    )
    masks = auxiliary_masks(rollout.valid, rollout.response_mask, depth)
    matches = masks & (jnp.stack(drafts) == main[None])
    return (jnp.sum(matches, axis=2, dtype=jnp.float32), jnp.sum(masks, axis=2, dtype=jnp.float32))


def completion_probability(
    model: Model,
    theta: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    response: int,
) -> Float[Array, " B"]:
    """π(completion | prompt) of every row, by teacher forcing at temperature 1.

    Args:
        model: the architecture.
        theta: trunk parameters.
        tokens: int32, left-padded prompts and right-padded completions.
        valid: real tokens.
        response: R; the last R columns hold the completion.
    """
    states = trunk_states(model, theta, tokens, valid)
    scores = score_tokens(model, theta, states.hidden[:, -response:], tokens[:, -response:])
    return jnp.exp(jnp.sum(jnp.where(valid[:, -response:], scores.log_probs, 0.0), axis=1))
