"""Grain pipelines: from examples to batches of prompts, resumable at the exact next prompt.

Leaves problems to `occ_jax.data.tasks` and `occ_jax.data.prepared`, and sampling to
`occ_jax.rollout`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from occ_jax.config import Config, TaskConfig
from occ_jax.data.examples import Example, Prompt, make_prompt
from occ_jax.data.prepared import PreparedSet, open_set
from occ_jax.data.tasks import completion_tokens, make_example, prompt_tokens
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.errors import UserError

# Tasks generate on demand, so the length only has to exceed the prompts of any run.
_ENDLESS = 2**31 - 1


class TrainingPrompts(NamedTuple):
    """The training prompts of a run."""

    prompts: grain.MapDataset[Prompt]  # endless, in the order of training
    epoch: int | None  # prompts an epoch; None for a task, whose prompts are always new
    overlong: int  # prompts of the set that are left out, as they are too long


def training_prompts(config: Config, tokenizer: Tokenizer) -> TrainingPrompts:
    """The training prompts of a run, in an order that `run.seed` decides.

    Raises:
        UserError: the prepared set is missing or damaged, or holds prompts longer than
            `rollout.max_prompt_tokens` that `dataset.overlong` does not leave out.
    """
    if config.dataset.name:
        return _set_prompts(config, tokenizer)
    return TrainingPrompts(task_prompts(config, tokenizer, config.run.seed), None, 0)


def _set_prompts(config: Config, tokenizer: Tokenizer) -> TrainingPrompts:
    """Prompts of a prepared set: each once an epoch, in a new order every epoch.

    The whole set is templated and tokenised once to know its lengths, and again prompt by prompt
    when training reads them: that takes seconds for tens of thousands, and only indices stay in
    memory.
    """
    dataset, width = config.dataset, prompt_columns(config)
    examples = open_set(Path(dataset.directory), dataset.name)
    fitting: list[int] = []
    overlong: list[Prompt] = []
    for index in range(examples.size):
        prompt = make_prompt(config, tokenizer, examples.example(index))
        if len(prompt.tokens) > width:
            overlong.append(prompt)
        else:
            fitting.append(index)
    if overlong and (dataset.overlong == "error" or not fitting):
        remedy = "dataset.overlong drop leaves them out" if fitting else "no prompt is left"
        raise UserError(
            f"{_too_long(overlong[0], width)}; {len(overlong):,} of {examples.size:,} prompts are "
            f"too long, {remedy}"
        )
    order = grain.MapDataset.source(fitting).seed(config.run.seed).shuffle().repeat()
    prompts = order.map(lambda index: make_prompt(config, tokenizer, examples.example(index)))
    return TrainingPrompts(prompts, len(fitting), len(overlong))


def _too_long(prompt: Prompt, width: int) -> str:
    return (
        f"prompt {prompt.example.id} of {prompt.example.source} has {len(prompt.tokens):,} tokens; "
        f"rollout.max_prompt_tokens allows {width:,}"
    )


def task_prompts(config: Config, tokenizer: Tokenizer, stream: int) -> grain.MapDataset[Prompt]:
    """Training prompts of the digit task, in the order of their index in `stream`.

    Nothing is shuffled: examples of consecutive indices are already independent.
    """

    def prompt(index: int) -> Prompt:
        return make_prompt(config, tokenizer, make_example(config.task, "train", index, stream))

    return grain.MapDataset.range(_ENDLESS).map(prompt)


def iterate(
    prompts: grain.MapDataset[Prompt], batch_size: int, *, process: int = 0, num_processes: int = 1
) -> grain.DatasetIterator[list[Prompt]]:
    """Batches of the prompts that one process samples.

    A step takes H·B prompts from the common order, and process h of H gets B consecutive ones, from
    h·B on. So the processes' batches, one after the other, are the batch of a run of one process,
    for any H and wherever epochs end. The iterator's state is one integer, the same on every
    process.

    Args:
        prompts: endless.
        batch_size: B, prompts a process and step.
        process: h, the index of this process.
        num_processes: H.
    """

    def prompt(index: int) -> Prompt:
        step, position = divmod(index, batch_size)
        result = prompts[(step * num_processes + process) * batch_size + position]
        assert result is not None  # a data set without filters has no gaps
        return result

    process_prompts = grain.MapDataset.range(len(prompts) // num_processes).map(prompt)
    endless = process_prompts.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(endless.batch(batch_size, batch_fn=list))


def prompts_read(batches: grain.DatasetIterator[list[Prompt]]) -> int:
    """Number of prompts that an iterator of `iterate` has yielded since the run began."""
    return int(batches.get_state()["next_index"])


def skip_to(batches: grain.DatasetIterator[list[Prompt]], prompts_read: int) -> None:
    """Moves an iterator of `iterate` behind the first `prompts_read` prompts of its process."""
    batches.set_state({"next_index": prompts_read})


def evaluation_prompts(config: Config, tokenizer: Tokenizer, count: int) -> dict[str, list[Prompt]]:
    """The first `count` prompts of each evaluation set, by the set's name; the same for every run.

    Raises:
        UserError: a prepared set is missing or damaged, or one of its prompts is longer than
            `rollout.max_prompt_tokens`: long questions are not left out, as that would change the
            benchmark.
    """
    if config.dataset.name:
        directory = Path(config.dataset.directory)
        sets = {name: open_set(directory, name) for name in config.dataset.evaluation}
    else:
        task = functools.partial(make_example, config.task, "evaluation")
        sets = {config.task.name: PreparedSet(count, task)}
    prompts: dict[str, list[Prompt]] = {}
    for name, (size, example) in sets.items():
        indices = range(min(count, size))
        prompts[name] = [make_prompt(config, tokenizer, example(index)) for index in indices]
    for prompts_of_set in prompts.values():
        _require_fit(prompts_of_set, prompt_columns(config))
    return prompts


def prompt_columns(config: Config) -> int:
    """P, the number of columns that prompts are padded to."""
    width = config.rollout.max_prompt_tokens
    return width if width > 0 else prompt_tokens(config.task)


def pad_prompts(
    config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts.

    Returns:
        int32 tokens [N, P] and bool validity [N, P].

    Raises:
        UserError: a prompt is longer than P.
    """
    width = prompt_columns(config)
    _require_fit(prompts, width)
    return pad([prompt.tokens for prompt in prompts], width, tokenizer.pad_id, left=True)


def _require_fit(prompts: Sequence[Prompt], width: int) -> None:
    for prompt in prompts:
        if len(prompt.tokens) > width:
            raise UserError(_too_long(prompt, width))


def encode_completions(
    config: TaskConfig, tokenizer: Tokenizer, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Right completions with the end-of-sequence token, padded on the right.

    Returns:
        int32 tokens [N, R'] and bool validity [N, R'], R' = `completion_tokens(config)`.

    Raises:
        UserError: the tokenizer needs more than one token a character.
    """
    width = completion_tokens(config)
    rows = [[*tokenizer.encode(e.completion), tokenizer.eos_ids[0]] for e in examples]
    for example, row in zip(examples, rows, strict=True):
        if len(row) > width:
            raise UserError(
                f"the tokenizer of model.checkpoint spells {example.completion!r} in "
                f"{len(row) - 1} tokens; task {config.name} needs one token a character or fewer"
            )
    return pad(rows, width, tokenizer.pad_id, left=False)


def pad(
    rows: Sequence[Sequence[int]], width: int, pad_id: int, *, left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids on one side: int32 [N, width] and their bool validity."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, columns] = row
        valid[index, columns] = True
    return tokens, valid
