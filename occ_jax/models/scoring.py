"""Log-probabilities of response tokens by every head, aligned by the token they speak of.

The trunk runs over all columns but the last, module k over the slots whose prediction exists. Both
then end at the last token, so the last R states of *every* head speak of the R response columns:
no shifting of masks, whatever the depth.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.models.model import Model
from occ_jax.types import Params


class TrunkStates(NamedTuple):
    """The trunk over columns 0 ... T-2."""

    hidden: Float[Array, "B T-1 D"]  # after the final norm
    mtp_input: Float[Array, "B T-1 D"]  # what enters the first MTP module


def column_positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every column in its own row: 0 for the first real token, and for left padding."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def trunk_states(
    model: Model, theta: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> TrunkStates:
    """Runs the trunk over every column that predicts one."""
    out = model.trunk(theta, tokens[:, :-1], column_positions(valid)[:, :-1], valid[:, :-1])
    return TrunkStates(out.hidden, out.mtp_input)


def auxiliary_states(
    model: Model,
    params: Params,
    mtp_input: Float[Array, "B T D"],
    tokens: Int[Array, "B T+1"],
    valid: Bool[Array, "B T+1"],
    response_tokens: int,
) -> list[Array]:
    """Every module's states for the response columns, K arrays [B, R, D].

    Args:
        model: the architecture.
        params: whose embedding and modules are used; what gradient may flow is decided here.
        mtp_input: from `trunk_states`.
        tokens: all columns.
        valid: real tokens.
        response_tokens: R; the prompt must have at least K+1 columns.
    """
    depth = model.config.num_mtp_modules
    states = model.mtp_states(
        params,
        mtp_input[:, :-1],
        tokens[:, :-1],
        column_positions(valid)[:, :-2],
        valid[:, :-1],
        depth,
    )
    return [state[:, -response_tokens:] for state in states]


def auxiliary_masks(
    valid: Bool[Array, "B T"], response_mask: Bool[Array, "B R"], depth: int
) -> Bool[Array, "K B R"]:
    """Response tokens that module k predicts from a real token, k = 1 ... depth.

    Module k speaks of column t from slot t-k-1; in a prompt shorter than k+1 that slot is padding.
    """
    columns, response = valid.shape[1], response_mask.shape[1]
    starts = [columns - response - k - 1 for k in range(1, depth + 1)]
    return jnp.stack([response_mask & valid[:, s : s + response] for s in starts])


def token_log_probs(
    logits: Float[Array, "B R V"], tokens: Int[Array, "B R"]
) -> Float[Array, "B R"]:
    """log softmax(logits)[token], float32.

    The token's logit is picked by comparison, not by a gather: it fuses with the reduction, its
    gradient is a select where a gather's is a scatter, and it shards over the vocabulary.
    """
    picked = jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool)
    chosen = jnp.sum(jnp.where(picked, logits, 0.0), axis=-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)
