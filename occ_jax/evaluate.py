"""How good a policy is: sampled accuracy, the exact objective, how well its modules draft."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from occ_jax.config import Config, computation
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import encode_completions, pad_prompts
from occ_jax.data.tasks import has_unique_completion
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.models.model import Model
from occ_jax.models.scoring import (
    auxiliary_masks,
    auxiliary_states,
    score_tokens,
    trunk_states,
)
from occ_jax.rewards.exact_match import exact_match
from occ_jax.rollout.sampler import sample
from occ_jax.sharding import rows
from occ_jax.types import Params, Rollout


class Evaluation(NamedTuple):
    """Records of one evaluation; `summarise` makes the figures of them."""

    scores: np.ndarray  # float32 [Q, n], reward of each completion of each question
    objective: np.ndarray | None  # float32 [Q], probability of the right completion
    agreement: np.ndarray  # float32 [K], module k's top-1 agreement with the main head
    lengths: np.ndarray  # int [Q, n], completion tokens
    truncated: float  # share of completions without an end


def evaluate(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    prompts: Sequence[Prompt],
    key: Key[Array, ""],
    *,
    num_samples: int,
) -> Evaluation:
    """Evaluates on the prompts of one set.

    Args:
        model: the architecture.
        config: task or dataset, rollout (temperature, lengths).
        mesh: where `params` lie.
        tokenizer: of the prompts.
        params: trunk and modules.
        prompts: Q questions.
        key: of the sampling.
        num_samples: n, completions a question.
    """
    chunk = _prompts_a_call(config, num_samples)
    scores: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    objectives: list[np.ndarray] = []
    agree = np.zeros((2, model.config.num_mtp_modules))
    complete = 0
    ends, filler = tokenizer.eos_ids, tokenizer.pad_id
    sampler = _sampler(model, computation(config), mesh, num_samples, ends, filler)
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        padded = [*part, *[part[0]] * (chunk - len(part))]  # one compiled shape
        columns = jax.device_put(pad_prompts(config, tokenizer, padded), rows(mesh))
        rollout, matches, counts = sampler(params, *columns, jax.random.fold_in(key, start))
        shape = (chunk, num_samples, config.rollout.max_new_tokens)
        tokens = np.asarray(rollout.tokens)[:, -shape[2] :].reshape(shape)[: len(part)]
        mask = np.asarray(rollout.response_mask).reshape(shape)[: len(part)]
        scores.append(exact_match(config, tokenizer, [p.example for p in part], tokens))
        masks.append(mask)
        complete += int(np.sum(np.any(np.isin(tokens, ends) & mask, axis=-1)))
        agree += np.stack([np.asarray(matches), np.asarray(counts)])
        if not config.dataset.name and has_unique_completion(config.task):
            found = exact_objective(model, config, mesh, tokenizer, params, padded)
            objectives.append(found[: len(part)])
    lengths = np.concatenate(masks).sum(-1)
    return Evaluation(
        scores=np.concatenate(scores),
        objective=np.concatenate(objectives) if objectives else None,
        agreement=agree[0] / np.maximum(agree[1], 1),
        lengths=lengths,
        truncated=1.0 - complete / lengths.size,
    )


def evaluate_sets(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    sets: Mapping[str, Sequence[Prompt]],
    key: Key[Array, ""],
    *,
    num_samples: int,
) -> dict[str, float]:
    """Figures of every evaluation set.

    A digit task's are "val/…". Of prepared sets each has its own, "val/<set>/…", and val/accuracy
    is the mean of their accuracies, every set counting alike.
    """
    figures = {
        name: summarise(
            evaluate(
                model,
                config,
                mesh,
                tokenizer,
                params,
                prompts,
                jax.random.fold_in(key, zlib.crc32(name.encode())) if config.dataset.name else key,
                num_samples=num_samples,
            )
        )
        for name, prompts in sets.items()
    }
    if not config.dataset.name:
        (only,) = figures.values()
        return only
    renamed = {
        figure.replace("val/", f"val/{name}/", 1): value
        for name, found in figures.items()
        for figure, value in found.items()
    }
    mean = float(np.mean([found["val/accuracy"] for found in figures.values()]))
    return {"val/accuracy": mean, **renamed}


def exact_objective(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    prompts: Sequence[Prompt],
) -> np.ndarray:
    """pi_theta(right completion | prompt) of every prompt of a digit task, by teacher forcing.

    Where exactly one completion is right this *is* the expected reward at temperature 1, without
    sampling noise.

    Returns:
        float32 [len(prompts)], probabilities.
    """
    questions, question_valid = pad_prompts(config, tokenizer, prompts)
    examples = [prompt.example for prompt in prompts]
    completions, mask = encode_completions(config.task, tokenizer, examples)
    tokens = np.concatenate([questions, completions], axis=1)
    valid = np.concatenate([question_valid, mask], axis=1)
    score = _answer_probability(model, mask.shape[1])
    return np.asarray(score(params["trunk"], *jax.device_put((tokens, valid), rows(mesh))))


def summarise(evaluation: Evaluation) -> dict[str, float]:
    """Means and 95% intervals clustered by question.

    avg@n = mean over questions of the share of right completions, SE = std / sqrt(Q) over
    questions; pass@n = share of questions with a right completion; the objective likewise.
    """
    samples = evaluation.scores.shape[1]
    per_question = evaluation.scores.mean(axis=1)
    figures = {
        f"val/avg@{samples}": float(per_question.mean()),
        f"val/avg@{samples}_ci95": half_width(per_question),
        "val/accuracy": float(per_question.mean()),
        f"val/pass@{samples}": float(evaluation.scores.max(axis=1).mean()),
        "val/response_length/mean": float(evaluation.lengths.mean()),
        "val/response_length/clip_ratio": evaluation.truncated,
    }
    if evaluation.objective is not None:
        figures["val/objective"] = float(evaluation.objective.mean())
        figures["val/objective_ci95"] = half_width(evaluation.objective)
    for k, value in enumerate(evaluation.agreement):
        figures[f"val/agreement_{k + 1}"] = float(value)
    return figures


def half_width(values: np.ndarray) -> float:
    """Half of the normal 95% confidence interval of a mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def _prompts_a_call(config: Config, num_samples: int) -> int:
    """Prompts that make about as many rows as a training rollout, and divide over the mesh."""
    shards = config.mesh.data * config.mesh.fsdp
    wanted = config.rollout.num_prompts * config.rollout.group_size // num_samples
    return max(1, wanted // shards) * shards


@functools.lru_cache(maxsize=16)
def _sampler(
    model: Model,
    config: Config,
    mesh: Mesh,
    num_samples: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[..., tuple[Rollout, Array, Array]]:
    """Samples and counts, per module, agreements with the main head over its own tokens."""

    def run(
        params: Params, prompts: Int[Array, "N P"], valid: Bool[Array, "N P"], key: Key[Array, ""]
    ) -> tuple[Rollout, Float[Array, " K"], Float[Array, " K"]]:
        rollout = sample(
            model,
            params,
            prompts,
            valid,
            key,
            group_size=num_samples,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            eos_ids=eos_ids,
            pad_id=pad_id,
        )
        matches, counts = _agreement(model, params, rollout)
        return rollout, matches, counts

    return jax.jit(run)


def _agreement(
    model: Model, params: Params, rollout: Rollout
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Tokens on which each module's most probable token is the main head's, and all its tokens."""
    depth, response = model.config.num_mtp_modules, rollout.response_mask.shape[1]
    if depth == 0:
        return jnp.zeros(0), jnp.zeros(0)
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
    return (
        jnp.sum(matches, axis=(1, 2), dtype=jnp.float32),
        jnp.sum(masks, axis=(1, 2), dtype=jnp.float32),
    )


@functools.lru_cache(maxsize=16)
def _answer_probability(model: Model, response: int) -> Callable[..., Array]:
    def run(
        theta: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> Float[Array, " B"]:
        states = trunk_states(model, theta, tokens, valid)
        scores = score_tokens(model, theta, states.hidden[:, -response:], tokens[:, -response:])
        log_probs = scores.log_probs
        return jnp.exp(jnp.sum(jnp.where(valid[:, -response:], log_probs, 0.0), axis=1))

    return jax.jit(run)
