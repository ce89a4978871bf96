"""Answers sampled and judged, the exact objective, how the modules draft."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from occ_jax.config import Config, computation
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import encode_completions, pad_prompts
from occ_jax.data.tasks import has_unique_completion
from occ_jax.data.tokenizer import Tokenizer, decode_completion
from occ_jax.evaluation.records import Record, RecordFile, Sampled, judged_records
from occ_jax.evaluation.tables import summarise
from occ_jax.models.model import Model
from occ_jax.models.scoring import (
    auxiliary_masks,
    auxiliary_states,
    score_tokens,
    trunk_states,
)
from occ_jax.parallel.exchange import (
    fold_in,
    gather_objects,
    get_all_rows,
    process_rows,
    put_all_rows,
    put_replicated,
)
from occ_jax.parallel.sharding import on_mesh, row_shardings, rows
from occ_jax.rewards.pool import VerifierPool
from occ_jax.rewards.scoring import judge_completions
from occ_jax.rl.gradients import micro_batches
from occ_jax.rollout.sampler import on_sampling_mesh, sample
from occ_jax.types import Params, Rollout


def evaluate(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    prompts: Sequence[Prompt],
    key: Key[Array, ""],
    pool: VerifierPool,
    *,
    num_samples: int,
    file: RecordFile | None = None,
    keep_completions: bool = False,
    show: Callable[[list[Record]], None] = lambda _: None,
) -> list[Record]:
    """Answers the prompts of one set, as far as `file` did not hold the answers.

    Args:
        model: the architecture.
        config: task or dataset, rollout (temperature, lengths), reward.
        mesh: where `params` lie.
        tokenizer: of the prompts.
        params: trunk and modules.
        prompts: Q questions.
        key: of the sampling; the answers to a question depend on its place and `key`.
        pool: judges completions.
        num_samples: n, completions a question.
        file: where records are kept, if anywhere.
        keep_completions: keep whole texts in them.
        show: is told the records there are, now and then.

    Returns:
        Q records, in the order of the questions; without those that `file` held on processes that
        do not have it.
    """
    answer = _answers(model, config, mesh, tokenizer, params, key, num_samples)
    chunk = call_of(config, num_samples).questions
    records, held = ([], 0) if file is None else (list(file.records), file.held)
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        if start + len(part) <= held:
            continue
        answers = answer(part, start)  # the same ones again if a kill left a part of the chunk
        own: list[Record] = []
        if own_part := part[process_rows(chunk)]:
            tokens = np.stack([sampled.tokens for sampled in answers])
            examples = [prompt.example for prompt in own_part]
            _, judged = judge_completions(pool, config, tokenizer, examples, tokens)
            own = judged_records(examples, answers, judged, keep_completions)
        new = _gather_records(own)[max(0, held - start) :]
        if file is not None:
            file.append(new)
        records += new
        show(records)
    return records


def _gather_records(own: list[Record]) -> list[Record]:
    """The records of all processes, in the order of the questions."""
    said = gather_objects([record._asdict() for record in own])
    return [Record(**record) for records in said for record in records]


def _answers(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    key: Key[Array, ""],
    num_samples: int,
) -> Callable[[Sequence[Prompt], int], list[Sampled]]:
    """Samples n answers to a chunk of questions, and returns those of this process's questions.

    All processes sample all of them together: there may be fewer questions than processes.
    """
    chunk, copies = call_of(config, num_samples)
    width = config.rollout.max_new_tokens
    ends, filler = tokenizer.eos_ids, tokenizer.pad_id
    sampler = jit_evaluation_sampler(
        model, computation(config), mesh, num_samples // copies, ends, filler
    )

    def run(part: Sequence[Prompt], start: int) -> list[Sampled]:
        padded = [*part, *[part[0]] * (chunk - len(part))]  # one compiled shape
        copied = [prompt for prompt in padded for _ in range(copies)]
        columns = (put_all_rows(mesh, x) for x in pad_prompts(config, tokenizer, copied))
        begin = put_replicated(mesh, np.array(start, np.uint32))
        rollout, drafts = sampler(params, *columns, key, begin)
        shape = (chunk, num_samples, width)
        tokens = get_all_rows(rollout.tokens)[:, -width:].reshape(shape)
        mask = get_all_rows(rollout.response_mask).reshape(shape)
        ended = np.any(np.isin(tokens, ends) & mask, axis=-1)
        objective: np.ndarray | None = None
        if not config.dataset.name and has_unique_completion(config.task):
            objective = exact_objective(model, config, mesh, tokenizer, params, copied)[::copies]
        # [K, questions]: over a question's answers.
        drafts = get_all_rows(drafts).reshape(*shape[:2], 2, -1).sum(axis=1)
        agreed, drafted = drafts.transpose(1, 2, 0)
        return [
            Sampled(
                tokens=tokens[row],
                texts=[decode_completion(tokenizer, ids) for ids in tokens[row].tolist()],
                lengths=mask[row].sum(-1).tolist(),
                truncated=(~ended[row]).tolist(),
                figures={
                    **({} if objective is None else {"objective": float(objective[row])}),
                    **{f"agreed_{k + 1}": float(x[row]) for k, x in enumerate(agreed)},
                    **{f"drafted_{k + 1}": float(x[row]) for k, x in enumerate(drafted)},
                },
            )
            for row in range(len(part))[process_rows(chunk)]
        ]

    return run


def evaluate_sets(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    sets: Mapping[str, Sequence[Prompt]],
    key: Key[Array, ""],
    pool: VerifierPool,
    *,
    num_samples: int,
) -> dict[str, float]:
    """Figures of every evaluation set, for the log of a run.

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
                set_key(config, mesh, name, key),
                pool,
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


def set_key(config: Config, mesh: Mesh, name: str, key: Key[Array, ""]) -> Key[Array, ""]:
    """The sampling key of one of several sets."""
    return fold_in(mesh, key, zlib.crc32(name.encode())) if config.dataset.name else key


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
    sampling noise. Of several processes all give the same prompts.

    Returns:
        float32 [len(prompts)], probabilities.
    """
    questions, question_valid = pad_prompts(config, tokenizer, prompts)
    examples = [prompt.example for prompt in prompts]
    completions, mask = encode_completions(config.task, tokenizer, examples)
    tokens = np.concatenate([questions, completions], axis=1)
    valid = np.concatenate([question_valid, mask], axis=1)
    score = _answer_probability(model, mesh, mask.shape[1])
    columns = (put_all_rows(mesh, x) for x in (tokens, valid))
    return get_all_rows(score(params["trunk"], *columns))


class Call(NamedTuple):
    """What an evaluation samples at once."""

    questions: int
    copies: int  # of every question, among which its answers are divided


def call_of(config: Config, num_samples: int) -> Call:
    """About as many rows as a rollout samples at once, whose prompts divide over the mesh.

    Where there are fewer questions than the mesh has places for rows, copies of them fill the
    places. Answers are the same however many copies there are.
    """
    options, shards = config.rollout, config.mesh.row_shards
    rows_at_once = options.num_prompts * options.group_size // options.sampling_chunks
    wanted = rows_at_once // num_samples
    if wanted >= shards:
        return Call(wanted // shards * shards, 1)
    possible = [n for n in range(1, num_samples + 1) if num_samples % n == 0 and shards % n == 0]
    copies = min((n for n in possible if shards // n <= wanted), default=possible[-1])
    return Call(shards // copies, copies)


@functools.lru_cache(maxsize=16)
def jit_evaluation_sampler(
    model: Model,
    config: Config,
    mesh: Mesh,
    num_samples: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Callable[..., tuple[Rollout, Array]]:
    """Samples and counts, per answer, agreements of every module with the main head, and tokens.

    Compiled for a config: (params, prompts, prompt_valid, key, begin) to a rollout of `num_samples`
    answers a prompt and counts [rows, 2, K]. The key is folded with `begin`, the place where the
    chunk of prompts begins.
    """

    def run(
        params: Params,
        prompts: Int[Array, "N P"],
        valid: Bool[Array, "N P"],
        key: Key[Array, ""],
        begin: UInt32[Array, ""],
    ) -> tuple[Rollout, Float[Array, "B 2 K"]]:
        rollout = sample(
            model,
            params,
            prompts,
            valid,
            jax.random.fold_in(key, begin),
            group_size=num_samples,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            eos_ids=eos_ids,
            pad_id=pad_id,
        )
        # In pieces as those of an update, which there is room for.
        wanted = config.algorithm.updates_per_rollout * config.algorithm.micro_batches
        pieces = math.gcd(wanted, rollout.tokens.shape[0] // config.mesh.row_shards)
        counts = jax.lax.map(
            lambda piece: jnp.stack(_agreement(model, params, piece)),
            micro_batches(rollout, pieces),
        )
        return rollout, jnp.moveaxis(counts, 3, 1).reshape(-1, *counts.shape[1:3])

    every_field: Any = Rollout._fields
    shardings = (row_shardings(mesh, Rollout(*every_field)), rows(mesh))
    return jax.jit(on_sampling_mesh(config, mesh, run), out_shardings=shardings)


def _agreement(
    model: Model, params: Params, rollout: Rollout
) -> tuple[Float[Array, "K B"], Float[Array, "K B"]]:
    """Tokens on which each module's most probable token is the main head's, and all its tokens."""
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
    return (
        jnp.sum(matches, axis=2, dtype=jnp.float32),
        jnp.sum(masks, axis=2, dtype=jnp.float32),
    )


@functools.lru_cache(maxsize=16)
def _answer_probability(model: Model, mesh: Mesh, response: int) -> Callable[..., Array]:
    def run(
        theta: Params, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
    ) -> Float[Array, " B"]:
        states = trunk_states(model, theta, tokens, valid)
        scores = score_tokens(model, theta, states.hidden[:, -response:], tokens[:, -response:])
        log_probs = scores.log_probs
        return jnp.exp(jnp.sum(jnp.where(valid[:, -response:], log_probs, 0.0), axis=1))

    return jax.jit(on_mesh(mesh, run), out_shardings=rows(mesh))
