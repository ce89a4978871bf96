"""Log-probabilities of response tokens by every head, aligned by the token they speak of.

The trunk runs over all columns but the last, module k over the slots whose prediction exists. Both
then end at the last token, so the last R states of *every* head speak of the R response columns:
no shifting of masks, whatever the depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.models.decoder import output_head, read_head
from occ_jax.models.distributions import entropy, soft_cross_entropy, token_log_probs
from occ_jax.models.layers import whole_tiles
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import for_every_place
from occ_jax.types import Params


class TrunkStates(NamedTuple):
    """The trunk over columns 0 ... T-2."""

    hidden: Float[Array, "B T-1 D"]  # after the final norm
    mtp_input: Float[Array, "B T-1 D"]  # what enters the first MTP module
    expert_load: Float[Array, "L E"]  # tokens that each expert of each such layer was sent


def column_positions(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of every column in its own row: 0 for the first real token, and for left padding."""
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)


def trunk_states(
    model: Model, theta: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> TrunkStates:
    """Runs the trunk over every column that predicts one."""
    last = tokens.shape[1] - 1
    arrays = (tokens[:, :-1], column_positions(valid)[:, :-1], valid[:, :-1])
    tokens, positions, valid = map(whole_tiles, arrays)
    out = model.trunk(theta, tokens, positions, valid)
    load = _expert_load(model, out.experts, valid)
    return TrunkStates(out.hidden[:, :last], out.mtp_input[:, :last], load)


def _expert_load(
    model: Model, experts: list[Int[Array, "repeats B T k"]], valid: Bool[Array, "B T"]
) -> Float[Array, "L E"]:
    """Counts real tokens only; [0, 0] for a model without experts."""
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
    if depth == 0:
        return jnp.zeros((0, *response_mask.shape), bool)
    columns, response = valid.shape[1], response_mask.shape[1]
    starts = [columns - response - k - 1 for k in range(1, depth + 1)]
    return jnp.stack([response_mask & valid[:, s : s + response] for s in starts])


class TokenScores(NamedTuple):
    """What the output head says of one column's token."""

    log_probs: Float[Array, "B R"]  # log pi(token), float32 nats
    entropy: Float[Array, "B R"]  # of the whole distribution, nats
    best: Int[Array, "B R"]  # int32, the most probable token


def score_tokens(
    model: Model,
    theta: Params,
    hidden: Float[Array, "B R D"],
    tokens: Int[Array, "B R"],
    temperature: float = 1.0,
) -> TokenScores:
    """Reads the output head without keeping its logits.

    With `model.logits_columns` set, [B, that, V] logits exist at a time, and the backward pass
    makes them again. What nothing reads is not computed.

    Args:
        model: the architecture.
        theta: whose head (and embedding, where tied) is read.
        hidden: states after a final norm.
        tokens: int32, the token each state is asked about.
        temperature: divides the logits.
    """
    logits_of = _head_reader(model, theta, hidden.shape[0])

    def score(hidden: Array, tokens: Array) -> TokenScores:
        logits = logits_of(hidden) / temperature
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
    """`soft_cross_entropy` of two states read by the same head, columns at a time as above.

    Args:
        model: the architecture.
        theta: whose head is read.
        teacher: states whose distribution p is data: no gradient.
        student: states whose distribution q is fitted to it.
        temperature: divides both logits.
    """
    logits_of = _head_reader(model, theta, student.shape[0])

    def loss(teacher: Array, student: Array) -> Array:
        return soft_cross_entropy(
            logits_of(teacher) / temperature, logits_of(student) / temperature
        )

    return _by_columns(model, loss, teacher, student)


def _head_reader(model: Model, theta: Params, count: int) -> Callable[[Array], Array]:
    """Logits of `count` rows of states, whatever columns; between devices the head travels once.

    What columns add to its gradient adds up in float32, where they lie.
    """
    head = output_head(model.config, theta).astype(jnp.float32)
    heads = for_every_place(head, count, None, "vocabulary")
    return functools.partial(read_head, model.config, heads)


_Result = TypeVar("_Result")


def _by_columns(model: Model, function: Callable[..., _Result], *arrays: Array) -> _Result:
    """`function` of arrays [B, R, ...], `model.logits_columns` columns at a time."""
    columns, size = arrays[0].shape[1], model.config.logits_columns
    if size == 0 or size >= columns:
        return function(*arrays)
    padding = -columns % size

    def cut(x: Array) -> Array:
        """[B, R, ...] to [pieces, B, size, ...]: rows stay where they lie on the mesh."""
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :columns]

    piece = jax.checkpoint(lambda parts: function(*parts))
    return jax.tree.map(join, jax.lax.map(piece, tuple(map(cut, arrays))))
