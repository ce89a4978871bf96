"""The starting policy: a checkpoint's, or random parameters, after a supervised warm-up if any.

The warm-up is short: next-token cross-entropy plus the modules' cross-entropy, both on tokens of
right completions only. A finished one is kept on disk under a digest of what determines it (model,
task, warm-up), so regimes and seeds start from the same parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import Config, Fact, fields_with, flatten, to_dict
from occ_jax.data.pipeline import encode_completions, iterate, pad_prompts, task_prompts
from occ_jax.errors import UserError
from occ_jax.models.huggingface import load_pretrained
from occ_jax.models.model import Model
from occ_jax.models.responses import auxiliary_masks, auxiliary_states, score_tokens, trunk_states
from occ_jax.parallel.exchange import on_first_process
from occ_jax.parallel.sharding import abstract, constrain, on_mesh, state_shardings
from occ_jax.rl.losses import mean, negative_log_likelihood
from occ_jax.setup import Setup
from occ_jax.training.checkpoint import restore_params, save_params
from occ_jax.types import Params

# Training prompts of the warm-up come from a stream that no run's seed names.
_STREAM = 2**31


def starting_params(setup: Setup, report: Callable[[str], None] = lambda _: None) -> Params:
    """Returns the parameters that every run of this (model, task, warm start) starts from.

    Args:
        setup: sections model, task and warm_start of its config matter.
        report: receives one line about their origin, for people.
    """
    config, model, mesh = setup.config, setup.model, setup.mesh
    like = abstract(mesh, jax.eval_shape(model.init, jax.random.key(0)))
    directory = cache_path(config)
    if config.warm_start.steps > 0 and on_first_process(directory.is_dir):
        report(f"starting policy: {directory}")
        return restore_params(directory, like)
    if config.model.checkpoint:
        report(f"starting policy: {config.model.checkpoint}")
        _, params = load_pretrained(config.model.checkpoint, config=config.model, mesh=mesh)
    else:
        init = jax.jit(model.init, out_shardings=state_shardings(mesh, like))
        params = init(jax.random.key(config.warm_start.seed))
    if config.warm_start.steps == 0:
        return params
    report(f"starting policy: {config.warm_start.steps} supervised steps")
    params = _fit(setup, params)
    _keep(directory, params)
    return params


def cache_path(config: Config) -> Path:
    """Returns the directory of a finished warm-up, named by a digest of what determines it."""
    ignored = fields_with(Fact.SAME_WARM_UP, Config)
    fields = {
        name: value for name, value in flatten(to_dict(config)).items() if name not in ignored
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
    return Path(config.warm_start.cache_directory) / f"{config.task.name}-{digest}"


def _keep(directory: Path, params: Params) -> None:
    """Saves under a name of this run's own, then renames: runs may start at the same time."""
    own = directory.with_name(f"{directory.name}.{on_first_process(os.getpid)}")
    own.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_params(own, params)
    except UserError:
        shutil.rmtree(own, ignore_errors=True)  # a full disk has no room for it
        raise

    def rename() -> None:
        try:
            own.rename(directory)
        except OSError:  # another run was quicker; the parameters are the same
            shutil.rmtree(own)

    on_first_process(rename)


def supervised_loss(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    response_mask: Bool[Array, "B R"],
    mtp_weight: float,
) -> Float[Array, ""]:
    """CE(next token) + mtp_weight * mean_k CE(module k), nats a completion token."""
    response = response_mask.shape[1]
    targets = tokens[:, -response:]
    states = trunk_states(model, params["trunk"], tokens, valid)
    heads = [
        states.hidden[:, -response:],
        *auxiliary_states(model, params, states.mtp_input, tokens, valid, response),
    ]
    depth = len(heads) - 1
    masks = [response_mask, *auxiliary_masks(valid, response_mask, depth)]
    losses = [
        mean(
            negative_log_likelihood(
                score_tokens(model, params["trunk"], head, targets).log_probs, mask
            )
        )
        for head, mask in zip(heads, masks, strict=True)
    ]
    return losses[0] + mtp_weight * sum(losses[1:], jnp.zeros(())) / max(depth, 1)


def _fit(setup: Setup, params: Params) -> Params:
    config, mesh, tokenizer = setup.config, setup.mesh, setup.tokenizer
    warm_start = config.warm_start
    optimizer = optax.adam(warm_start.learning_rate)
    moments = state_shardings(mesh, jax.eval_shape(optimizer.init, params))
    shardings = (state_shardings(mesh, params), moments)  # those of what is donated

    def step(params: Params, opt_state: Any, *batch: Array) -> Any:
        tokens, valid, mask = (constrain(x, "rows", None) for x in batch)
        gradients = jax.grad(
            lambda p: supervised_loss(setup.model, p, tokens, valid, mask, warm_start.mtp_weight)
        )(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = jax.jit(optimizer.init, out_shardings=moments)(params)
    step = jax.jit(on_mesh(mesh, step), out_shardings=shardings, donate_argnums=(0, 1))
    batches = iterate(task_prompts(config, tokenizer, _STREAM), warm_start.batch_size)
    for _ in range(warm_start.steps):
        batch = next(batches)
        prompts, prompt_valid = pad_prompts(config, tokenizer, batch)
        examples = [prompt.example for prompt in batch]
        completions, mask = encode_completions(config.task, tokenizer, examples)
        # The same on every process, so each gives all of it.
        tokens = np.concatenate([prompts, completions], axis=1)
        valid = np.concatenate([prompt_valid, mask], axis=1)
        params, opt_state = step(params, opt_state, tokens, valid, mask)
    return params
