"""Evaluation: questions answered in chunks, judged and recorded, and the exact objective."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from occ_jax.config import Config
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import encode_completions, pad_prompts
from occ_jax.data.tasks import has_unique_completion
from occ_jax.data.tokenizer import decode_completion
from occ_jax.evaluation.records import Record, RecordFile, Sampled, judged_records
from occ_jax.evaluation.summary import summarise
from occ_jax.parallel.exchange import (
    fold_in,
    gather_objects,
    get_all_rows,
    process_rows,
    put_all_rows,
    put_replicated,
)
from occ_jax.rewards.judging import judge_completions
from occ_jax.setup import Setup
from occ_jax.types import Params


def evaluate(
    setup: Setup,
    params: Params,
    prompts: Sequence[Prompt],
    key: Key[Array, ""],
    num_samples: int,
    *,
    file: RecordFile | None = None,
    show: Callable[[list[Record]], None] = lambda _: None,
) -> list[Record]:
    """Answers the Q questions of one set that `file` does not hold answers to, n times each.

    The answers to a question depend on its place in the set and `key`. `show` is called with the
    records so far, after every chunk.

    Returns:
        Q records, in the order of the questions; without those that `file` held on processes that
        do not have it.
    """
    chunk = call_of(setup.config, num_samples).questions
    records, held = ([], 0) if file is None else (list(file.records), file.held)
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        if start + len(part) <= held:
            continue
        # The same answers again if a kill left a part of the chunk.
        answers = _answer(setup, params, part, start, key, num_samples)
        own: list[Record] = []
        if own_part := part[process_rows(chunk)]:
            tokens = np.stack([sampled.tokens for sampled in answers])
            examples = [prompt.example for prompt in own_part]
            _, judged = judge_completions(
                setup.pool, setup.config, setup.tokenizer, examples, tokens
            )
            keep_completions = file is not None and file.keeps_completions
            own = judged_records(examples, answers, judged, keep_completions)
        gathered = gather_objects([record._asdict() for record in own])
        all_records = [Record(**record) for process in gathered for record in process]
        new = all_records[max(0, held - start) :]
        if file is not None:
            file.append(new)
        records += new
        show(records)
    return records


def _answer(
    setup: Setup,
    params: Params,
    part: Sequence[Prompt],
    start: int,
    key: Key[Array, ""],
    num_samples: int,
) -> list[Sampled]:
    """Samples n answers to a chunk of questions, and returns those of this process's questions.

    All processes sample all of them together: there may be fewer questions than processes.
    """
    config, mesh, tokenizer = setup.config, setup.mesh, setup.tokenizer
    chunk, copies = call_of(config, num_samples)
    width = config.rollout.max_new_tokens
    padded = [*part, *[part[0]] * (chunk - len(part))]  # one compiled shape
    copied = [prompt for prompt in padded for _ in range(copies)]
    columns = (put_all_rows(mesh, x) for x in pad_prompts(config, tokenizer, copied))
    first = put_replicated(mesh, np.array(start, np.uint32))
    rollout, counts = setup.programs.answer(
        params, *columns, key, first, num_samples=num_samples // copies
    )
    shape = (chunk, num_samples, width)
    tokens = get_all_rows(rollout.tokens)[:, -width:].reshape(shape)
    mask = get_all_rows(rollout.response_mask).reshape(shape)
    ended = np.any(np.isin(tokens, tokenizer.eos_ids) & mask, axis=-1)
    objective: np.ndarray | None = None
    if not config.dataset.name and has_unique_completion(config.task):
        objective = exact_objective(setup, params, copied)[::copies]
    # [K, questions]: over a question's answers.
    counts = get_all_rows(counts).reshape(*shape[:2], 2, -1).sum(axis=1)
    agreed, drafted = counts.transpose(1, 2, 0)
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


def evaluate_sets(
    setup: Setup,
    params: Params,
    sets: Mapping[str, Sequence[Prompt]],
    key: Key[Array, ""],
    *,
    num_samples: int,
) -> dict[str, float]:
    """Computes the figures of every evaluation set, for the log of a run.

    A digit task's are "val/…". Each of several prepared sets has its own, "val/<set>/…", and
    val/accuracy is the mean of their accuracies, every set counting alike.
    """
    figures: dict[str, dict[str, float]] = {}
    for name, prompts in sets.items():
        key_of_set = set_key(setup.config, setup.mesh, name, key)
        figures[name] = summarise(evaluate(setup, params, prompts, key_of_set, num_samples))
    if not setup.config.dataset.name:
        (only,) = figures.values()
        return only
    renamed = {
        figure.replace("val/", f"val/{name}/", 1): value
        for name, of_set in figures.items()
        for figure, value in of_set.items()
    }
    mean = float(np.mean([of_set["val/accuracy"] for of_set in figures.values()]))
    return {"val/accuracy": mean, **renamed}


def set_key(config: Config, mesh: Mesh, name: str, key: Key[Array, ""]) -> Key[Array, ""]:
    """Returns the sampling key of one of several sets."""
    return fold_in(mesh, key, zlib.crc32(name.encode())) if config.dataset.name else key


def exact_objective(setup: Setup, params: Params, prompts: Sequence[Prompt]) -> np.ndarray:
    """Computes π(right completion | prompt) of every prompt of a digit task, by teacher forcing.

    If exactly one completion is right, this *is* the expected reward at temperature 1, without
    sampling noise. All processes pass the same prompts.

    Returns:
        float32 [len(prompts)], probabilities.
    """
    config, tokenizer = setup.config, setup.tokenizer
    questions, question_valid = pad_prompts(config, tokenizer, prompts)
    examples = [prompt.example for prompt in prompts]
    completions, mask = encode_completions(config.task, tokenizer, examples)
    tokens = np.concatenate([questions, completions], axis=1)
    valid = np.concatenate([question_valid, mask], axis=1)
    columns = (put_all_rows(setup.mesh, x) for x in (tokens, valid))
    probability = setup.programs.completion_probability
    return get_all_rows(probability(params["trunk"], *columns, response=mask.shape[1]))


class Call(NamedTuple):
    """The size of one sampling call of an evaluation."""

    questions: int
    copies: int  # of every question; its answers are divided among them


def call_of(config: Config, num_samples: int) -> Call:
    """Takes about as many rows as a rollout samples at once, divisible over the mesh.

    If rows lie on more devices than there are questions, copies of the questions fill the devices.
    The answers do not depend on the number of copies.
    """
    options, shards = config.rollout, config.mesh.row_shards
    rows_at_once = options.num_prompts * options.group_size // options.sampling_chunks
    wanted = rows_at_once // num_samples
    if wanted >= shards:
        return Call(wanted // shards * shards, 1)
    possible = [n for n in range(1, num_samples + 1) if num_samples % n == 0 and shards % n == 0]
    copies = min((n for n in possible if shards // n <= wanted), default=possible[-1])
    return Call(shards // copies, copies)
