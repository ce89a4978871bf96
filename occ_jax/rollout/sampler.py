"""Sampling of completions with a KV cache, with their log-probabilities.

One jitted call takes prompts to a `Rollout`: a prefill over the distinct prompts, their caches
repeated G times, then one trunk pass over a single column a token until every row has ended. The
MTP modules' log-probabilities of the sampled tokens come from the trunk states met on the way, so
they cost one pass of the modules and none of the trunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from occ_jax.config import Config
from occ_jax.models.cache import extend
from occ_jax.models.decoder import Cache
from occ_jax.models.distributions import token_log_probs
from occ_jax.models.model import Model
from occ_jax.models.pieces import join, split
from occ_jax.models.responses import auxiliary_states, column_positions, score_tokens
from occ_jax.parallel.sharding import constrain, on_mesh, with_gathered_weights
from occ_jax.types import Params, Rollout, map_rows

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _Carry(NamedTuple):
    """State of the decoding loop; column P+j is sampled in round j."""

    round: Int[Array, ""]
    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    log_probs: Float[Array, "B R"]
    done: Bool[Array, " B"]
    cache: Cache
    mtp_input: Float[Array, "B T-1 D"] | None


def on_sampling_mesh(
    config: Config, mesh: Mesh, function: Callable[Concatenate[Params, _Arguments], _Result]
) -> Callable[Concatenate[Params, _Arguments], _Result]:
    """Prepares a sampling function for jit: `rollout.gather_weights` decides how weights lie."""
    if config.rollout.gather_weights:
        return with_gathered_weights(mesh, config.model.dtype, function)
    return on_mesh(mesh, function)


def sample_in_chunks(
    chunks: int,
    model: Model,
    params: Params,
    prompts: Int[Array, "N P"],
    prompt_valid: Bool[Array, "N P"],
    key: Key[Array, ""],
    **options: Any,
) -> Rollout:
    """Samples the prompts in `chunks` parts one after the other, so that one part's cache fits.

    Part i of the prompts gets the completions that a call of `sample` for it alone would give with
    the key `jax.random.fold_in(key, i)`; one part is a plain call of `sample`.
    """
    if chunks == 1:
        return sample(model, params, prompts, prompt_valid, key, **options)

    def chunked(x: Array) -> Array:
        return constrain(split(x, 0, x.shape[0] // chunks), None, "rows", None)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(chunks))
    parts = jax.lax.map(
        lambda part: sample(model, params, *part, **options),
        (chunked(prompts), chunked(prompt_valid), keys),
    )
    return map_rows(lambda x, axis: join(x, axis, chunks * x.shape[axis + 1]), parts)


# Eleven arguments: the sampler is used without a trainer's config, and each is one of its settings.
def sample(
    model: Model,
    params: Params,
    prompts: Int[Array, "N P"],
    prompt_valid: Bool[Array, "N P"],
    key: Key[Array, ""],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: tuple[int, ...],
    pad_id: int,
    auxiliary: bool = False,
) -> Rollout:
    """Samples `group_size` completions of every prompt.

    Args:
        model: the architecture.
        params: trunk and modules.
        prompts: int32, padded on the left.
        prompt_valid: their real tokens.
        key: random key; the same key gives the same completions.
        group_size: G; rows of one prompt are neighbours in the result.
        max_new_tokens: R; a row without an end-of-sequence token by then is cut.
        temperature: divides the logits; 0 takes the most probable token. Log-probabilities are
            those of the distribution sampled from, at temperature 0 of the untempered one.
        eos_ids: any of them ends a row; it is part of the response.
        pad_id: fills columns after the end.
        auxiliary: also return the modules' log-probabilities of the sampled tokens.

    Returns:
        A `Rollout` of B = N G rows and T = P + R columns.
    """
    num_prompts, prompt_tokens = prompts.shape
    rows = num_prompts * group_size
    theta = params["trunk"]
    prompt_positions = column_positions(prompt_valid)
    prefill = model.trunk(theta, prompts, prompt_positions, prompt_valid)

    def per_completion(x: Array) -> Array:
        repeated = jnp.repeat(x, group_size, axis=0)
        return constrain(repeated, "rows", *[None] * (x.ndim - 1))

    def widen(x: Array, size: int) -> Array:
        """Room for `size` columns after the prompt's."""
        return jnp.pad(x, [(0, 0), (0, size)] + [(0, 0)] * (x.ndim - 2))

    next_position = per_completion(prompt_positions[:, -1] + 1)

    def draw(carry: _Carry, hidden: Float[Array, "B 1 D"]) -> _Carry:
        """Samples round `carry.round` from the state of the column before."""
        logits = model.logits(theta, hidden)[:, 0]
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
        else:
            logits = logits / temperature
            token = jax.random.categorical(jax.random.fold_in(key, carry.round), logits, axis=-1)
        log_prob = token_log_probs(logits[:, None], token[:, None])
        token = jnp.where(carry.done, pad_id, token).astype(jnp.int32)
        column, live = prompt_tokens + carry.round, ~carry.done

        def put(array: Array, values: Array, at: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(array, values, at, axis=1)

        return carry._replace(
            round=carry.round + 1,
            tokens=put(carry.tokens, token[:, None], column),
            valid=put(carry.valid, live[:, None], column),
            log_probs=put(carry.log_probs, jnp.where(live[:, None], log_prob, 0.0), carry.round),
            done=carry.done | jnp.isin(token, jnp.array(eos_ids)),
        )

    def decode(carry: _Carry) -> _Carry:
        column = prompt_tokens + carry.round - 1
        token = jax.lax.dynamic_slice_in_dim(carry.tokens, column, 1, axis=1)
        position = (next_position + carry.round - 1)[:, None]
        out = model.trunk(theta, token, position, carry.valid, carry.cache, column)
        carry = carry._replace(cache=out.cache)
        if carry.mtp_input is not None:
            states = jax.lax.dynamic_update_slice_in_dim(
                carry.mtp_input, out.mtp_input, column, axis=1
            )
            carry = carry._replace(mtp_input=states)
        return draw(carry, out.hidden)

    carry = _Carry(
        round=jnp.zeros((), jnp.int32),
        tokens=jnp.pad(
            per_completion(prompts), [(0, 0), (0, max_new_tokens)], constant_values=pad_id
        ),
        valid=widen(per_completion(prompt_valid), max_new_tokens),
        log_probs=jnp.zeros((rows, max_new_tokens), jnp.float32),
        done=jnp.zeros(rows, bool),
        cache=extend(prefill.cache, copies=group_size, columns=max_new_tokens),
        mtp_input=(
            widen(per_completion(prefill.mtp_input), max_new_tokens - 1) if auxiliary else None
        ),
    )
    carry = draw(carry, per_completion(prefill.hidden[:, -1:]))
    carry = jax.lax.while_loop(
        lambda c: (c.round < max_new_tokens) & ~jnp.all(c.done), decode, carry
    )
    rollout = Rollout(
        tokens=carry.tokens,
        valid=carry.valid,
        response_mask=carry.valid[:, prompt_tokens:],
        log_probs=carry.log_probs,
        auxiliary_log_probs=None,
    )
    if carry.mtp_input is None:
        return rollout
    states = auxiliary_states(
        model, params, carry.mtp_input, carry.tokens, carry.valid, max_new_tokens
    )
    targets = carry.tokens[:, prompt_tokens:]
    scale = 1.0 if temperature == 0 else temperature
    scores = [score_tokens(model, theta, state, targets, scale).log_probs for state in states]
    return rollout._replace(
        auxiliary_log_probs=jnp.where(rollout.response_mask[None], jnp.stack(scores), 0.0)
    )
