"""Completions for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from occ_jax.config import Config
from occ_jax.data.examples import Example, make_prompt, prompt_text
from occ_jax.data.pipeline import evaluation_prompts, pad
from occ_jax.data.tokenizer import Tokenizer, decode_completion
from occ_jax.errors import UserError
from occ_jax.programs import make_programs
from occ_jax.types import Params


def generate(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    *,
    prompts: Sequence[str] | None,
    temperature: float,
) -> list[tuple[str, str]]:
    """One completion a prompt.

    Args:
        config: sections task and dataset, rollout.max_new_tokens and run.seed matter.
        mesh: the devices that hold `params`.
        tokenizer: of the model.
        params: trunk and modules.
        prompts: texts, put in `dataset.template` like a set's problems; None for five evaluation
            prompts.
        temperature: 0 takes the most probable token.

    Returns:
        (prompt, completion) pairs of text.

    Raises:
        UserError: an empty prompt, or one that the tokenizer cannot spell.
    """
    if prompts is None:
        sets = evaluation_prompts(config, tokenizer, 5)
        chosen = [prompt for of_set in sets.values() for prompt in of_set][:5]
    elif not all(prompts):
        raise UserError("a prompt is empty; give at least one character")
    else:
        chosen = [
            make_prompt(config, tokenizer, Example(text, answer="", source="", id=""))
            for text in prompts
        ]
    width = max(len(prompt.tokens) for prompt in chosen)
    rows = [prompt.tokens for prompt in chosen]
    tokens, valid = pad(rows, width, tokenizer.pad_id, left=True)
    programs = make_programs(config, mesh, tokenizer.eos_ids, tokenizer.pad_id)
    key = jax.random.key(config.run.seed)
    rollout = programs.complete(
        params, jnp.asarray(tokens), jnp.asarray(valid), key, temperature=temperature
    )
    completions = np.asarray(rollout.tokens)[:, tokens.shape[1] :].tolist()
    return [
        (prompt_text(config, prompt.example), decode_completion(tokenizer, row))
        for prompt, row in zip(chosen, completions, strict=True)
    ]
