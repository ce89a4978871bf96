"""States and log-probabilities of response tokens, for the main head and for every module's head.

They are aligned by the predicted token. The trunk runs over all columns except the last, module k
over the slots that predict an existing column. So the last state of *every* head predicts the last
token, and its last R states predict the R response columns: no mask is shifted, at any depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.models.decoder import output_head, read_head
from occ_jax.models.distributions import entropy, soft_cross_entropy, token_log_probs
from occ_jax.models.layers import whole_tiles
from occ_jax.models.model import Model
from occ_jax.models.pieces import map_in_pieces
from occ_jax.parallel.sharding import copy_per_row_shard
from occ_jax.types import Params


class TrunkStates(NamedTuple):
    """Result of the trunk over columns 0 ... T-2."""

    hidden: Float[Array, "B T-1 D"]  # after the final norm
    mtp_input: Float[Array, "B T-1 D"]  # input of the first MTP module
    expert_load: Float[Array, "L E"]  # tokens of every expert, for each MoE layer


def column_positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every column in its own row; 0 for the first real token and for left padding."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def trunk_states(
    model: Model, theta: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> TrunkStates:
    """Runs the trunk over every column that predicts another one."""
    last = tokens.shape[1] - 1
    arrays = (tokens[:, :-1], column_positions(valid)[:, :-1], valid[:, :-1])
    tokens, positions, valid = map(whole_tiles, arrays)
    out = model.trunk(theta, tokens, positions, valid)
    load = _expert_load(model, out.experts, valid)
    return TrunkStates(out.hidden[:, :last], out.mtp_input[:, :last], load)


def _expert_load(
    model: Model, experts: list[Int[Array, "repeats B T k"]], valid: Bool[Array, "B T"]
) -> Float[Array, "L E"]:
    """Counts the real tokens of every expert; [0, 0] for a model without experts."""
    moe = model.config.moe
    if moe is None:
        return jnp.zeros((0, 0))
    chosen = jnp.concatenate(experts)
    counted = jnp.broadcast_to(valid[None, :, :, None], chosen.shape)
    rows = jnp.where(counted, chosen, moe.num_experts).reshape(chosen.shape[0], -1)
    count = jax.vmap(lambda row: jnp.bincount(row, length=moe.num_experts + 1))
    return count(rows)[:, :-1].astype(jnp.float32)


def auxiliary_states(
    model: Model,
    params: Params,
    mtp_input: Float[Array, "B T D"],
    tokens: Int[Array, "B T+1"],
    valid: Bool[Array, "B T+1"],
    response_tokens: int,
) -> list[Array]:
    """States of every module for the response columns.

    Args:
        model: the architecture.
        params: only the embedding and the modules are used; the caller stops gradients in them.
        mtp_input: from `trunk_states`.
        tokens: all columns.
        valid: real tokens.
        response_tokens: R; the prompt must have at least K+1 columns.

    Returns:
        K arrays [B, R, D].
    """
    depth, positions = model.config.num_mtp_modules, column_positions(valid)[:, :-2]
    states = model.mtp_states(
        params, mtp_input[:, :-1], tokens[:, :-1], positions, valid[:, :-1], depth
    )
    return [state[:, -response_tokens:] for state in states]


def auxiliary_masks(
    valid: Bool[Array, "B T"], response_mask: Bool[Array, "B R"], depth: int
) -> Bool[Array, "K B R"]:
    """Response tokens that module k predicts from a real token, for k = 1 ... depth.

    Module k predicts column t from slot t-k-1. If the prompt is shorter than k+1, that slot is
    padding for the first response tokens.
    """
    if depth == 0:
        return jnp.zeros((0, *response_mask.shape), bool)
    columns, response = valid.shape[1], response_mask.shape[1]
    starts = [columns - response - k - 1 for k in range(1, depth + 1)]
    return jnp.stack([response_mask & valid[:, s : s + response] for s in starts])


class TokenScores(NamedTuple):
    """Scores of the response tokens under one head."""

    log_probs: Float[Array, "B R"]  # log π(token), float32, nats
    entropy: Float[Array, "B R"]  # of the distribution over the vocabulary, nats
    best: Int[Array, "B R"]  # int32, the most probable token


def score_tokens(
    model: Model,
    theta: Params,
    hidden: Float[Array, "B R D"],
    tokens: Int[Array, "B R"],
    temperature: float = 1.0,
) -> TokenScores:
    """Scores tokens with the output head, without keeping the logits.

    If `model.logits_columns` is set, the logits of that many columns exist at a time, and the
    backward pass recomputes them. XLA removes the scores that the caller does not use.

    Args:
        model: the architecture.
        theta: trunk parameters; the output head (or the tied embedding) is used.
        hidden: states after a final norm.
        tokens: int32, the token that each state predicts.
        temperature: divides the logits.
    """
    logits_of = _head_reader(model, theta, hidden.shape[0], temperature)

    def score(hidden: Array, tokens: Array) -> TokenScores:
        logits = logits_of(hidden)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return TokenScores(token_log_probs(logits, tokens), entropy(logits), best)

    return _by_columns(model, score, hidden, tokens)


def distillation_losses(
    model: Model,
    theta: Params,
    teacher: Float[Array, "B R D"],
    student: Float[Array, "B R D"],
    temperature: float = 1.0,
) -> Float[Array, "B R"]:
    """`soft_cross_entropy` of two states under the same head, in pieces like `score_tokens`.

    `temperature` divides both logits. Those of the teacher get no gradient.
    """
    logits_of = _head_reader(model, theta, student.shape[0], temperature)

    def loss(teacher: Array, student: Array) -> Array:
        return soft_cross_entropy(logits_of(teacher), logits_of(student))

    return _by_columns(model, loss, teacher, student)


def _head_reader(
    model: Model, theta: Params, rows: int, temperature: float
) -> Callable[[Array], Array]:
    """A function from states of `rows` rows to logits / temperature, to be called on any columns.

    The head is sent between devices once for all calls. Its gradient adds up over the columns in
    float32, on the device that has the rows.
    """
    head = output_head(model.config, theta).astype(jnp.float32)
    heads = copy_per_row_shard(head, rows, None, "vocabulary")
    return lambda hidden: read_head(model.config, heads, hidden) / temperature


_Result = TypeVar("_Result")


def _by_columns(model: Model, function: Callable[..., _Result], *arrays: Array) -> _Result:
    """`function` of arrays [B, R, ...], on `model.logits_columns` columns at a time."""
    size = model.config.logits_columns
    if size == 0 or size >= arrays[0].shape[1]:
        return function(*arrays)
    return map_in_pieces(function, arrays, axis=1, size=size)
