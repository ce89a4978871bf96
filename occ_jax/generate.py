"""Completions for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from occ_jax.config import Config
from occ_jax.data.pipeline import evaluation_examples, pad
from occ_jax.data.tokenizer import EOS_ID, PAD_ID, decode, encode
from occ_jax.errors import UserError
from occ_jax.models.model import Model
from occ_jax.rollout.sampler import sample
from occ_jax.types import Params


def generate(
    model: Model,
    config: Config,
    params: Params,
    *,
    prompts: Sequence[str] | None,
    temperature: float,
) -> list[tuple[str, str]]:
    """One completion a prompt.

    Args:
        model: the architecture.
        config: rollout.max_new_tokens and run.seed matter.
        params: trunk and modules.
        prompts: texts; None for five of the task's evaluation prompts.
        temperature: 0 takes the most probable token.

    Returns:
        (prompt, completion) pairs.

    Raises:
        UserError: an empty prompt or a character the tokenizer does not have.
    """
    if prompts is None:
        prompts = [example.prompt for example in evaluation_examples(config.task, 5)]
    try:
        encoded = [encode(prompt) for prompt in prompts]
    except ValueError as error:
        raise UserError(str(error)) from error
    if not all(encoded):
        raise UserError("a prompt is empty; give at least one character")
    tokens, valid = pad(encoded, max(map(len, encoded)), left=True)
    rollout = jax.jit(
        lambda key: sample(
            model,
            params,
            jnp.asarray(tokens),
            jnp.asarray(valid),
            key,
            group_size=1,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=temperature,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
        )
    )(jax.random.key(config.run.seed))
    completions = np.asarray(rollout.tokens)[:, tokens.shape[1] :].tolist()
    return [(prompt, decode(row)) for prompt, row in zip(prompts, completions, strict=True)]
