"""Grain pipelines: from examples to batches of prompts, resumable at the exact next one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from occ_jax.config import Config, TaskConfig
from occ_jax.data.examples import Example, Prompt, make_prompt
from occ_jax.data.prepared import open_set
from occ_jax.data.tasks import Split, completion_tokens, make_example, prompt_tokens
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.errors import UserError

# Generated on demand, so the length only has to exceed what any run consumes.
_ENDLESS = 2**31 - 1


class TrainingPrompts(NamedTuple):
    """What a run trains on."""

    prompts: grain.MapDataset[Prompt]  # endless, in the order of training
    epoch: int | None  # prompts until all have come; None for a task, which makes new ones
    overlong: int  # prompts of the set left out for their length


class TaskSource:
    """Random access to a split, as grain's `RandomAccessDataSource` asks for."""

    def __init__(self, config: TaskConfig, split: Split, stream: int) -> None:
        self._config = config
        self._split: Split = split
        self._stream = stream

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Example:
        return make_example(self._config, self._split, int(index), self._stream)

    def __repr__(self) -> str:
        return f"TaskSource({self._config}, {self._split!r}, {self._stream})"


def training_prompts(config: Config, tokenizer: Tokenizer) -> TrainingPrompts:
    """The prompts of a run, in an order that `run.seed` decides.

    Raises:
        UserError: the prepared set is not there or damaged, or holds prompts too long for
            `rollout.max_prompt_tokens` that `dataset.overlong` does not leave out.
    """
    if config.dataset.name:
        return _set_prompts(config, tokenizer)
    return TrainingPrompts(task_prompts(config, tokenizer, config.run.seed), None, 0)


def _set_prompts(config: Config, tokenizer: Tokenizer) -> TrainingPrompts:
    """A prepared set: every prompt once an epoch, every epoch in an order of its own.

    The whole set is templated and tokenised once to know its lengths, and again prompt by prompt
    as training asks for them: seconds for tens of thousands, and only numbers stay in memory.
    """
    dataset = config.dataset
    examples = open_set(Path(dataset.directory), dataset.name)
    kept: list[int] = []
    long: list[Prompt] = []
    for index in range(examples.size):
        prompt = make_prompt(config, tokenizer, examples.example(index))
        if len(prompt.tokens) > prompt_columns(config):
            long.append(prompt)
        else:
            kept.append(index)
    if long and (dataset.overlong == "error" or not kept):
        remedy = "dataset.overlong drop leaves them out" if kept else "no other is left"
        raise UserError(
            f"{_too_long(long[0], prompt_columns(config))}; of {examples.size:,} prompts "
            f"{len(long):,} are too long, {remedy}"
        )
    order = grain.MapDataset.source(kept).seed(config.run.seed).shuffle().repeat()
    prompts = order.map(lambda index: make_prompt(config, tokenizer, examples.example(index)))
    return TrainingPrompts(prompts, len(kept), len(long))


def _too_long(prompt: Prompt, width: int) -> str:
    return (
        f"prompt {prompt.example.id} of {prompt.example.source} has {len(prompt.tokens):,} tokens; "
        f"rollout.max_prompt_tokens allows {width:,}"
    )


def task_prompts(config: Config, tokenizer: Tokenizer, stream: int) -> grain.MapDataset[Prompt]:
    """Training prompts of the digit task, in the order of their index in `stream`.

    Nothing is shuffled: examples of consecutive indices are already independent.
    """
    source = TaskSource(config.task, "train", stream)
    return grain.MapDataset.source(source).map(
        lambda example: make_prompt(config, tokenizer, example)
    )


def iterate(
    prompts: grain.MapDataset[Prompt], batch_size: int, *, host: int = 0, num_hosts: int = 1
) -> grain.DatasetIterator[list[Prompt]]:
    """Batches of prompts of one host of several.

    Of the H·B prompts that a step takes from the common order, host h of H gets B in a row, from
    h·B on: the hosts' batches one after the other are the batch of a run of one host, whatever H
    is and wherever epochs end. The iterator's state is one integer, the same on every host.

    Args:
        prompts: endless.
        batch_size: B, prompts a host and step.
        host: h, this process's index.
        num_hosts: H.
    """
    mine = prompts
    if num_hosts > 1:
        mine = grain.MapDataset.source(_Share(prompts, batch_size, host, num_hosts))
    endless = mine.to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(endless.batch(batch_size, batch_fn=list))


class _Share:
    """One host's prompts, as grain's `RandomAccessDataSource` asks for."""

    def __init__(
        self, prompts: grain.MapDataset[Prompt], batch_size: int, host: int, num_hosts: int
    ) -> None:
        self._prompts, self._size, self._host, self._hosts = prompts, batch_size, host, num_hosts

    def __len__(self) -> int:
        return len(self._prompts) // self._hosts

    def __getitem__(self, index: int) -> Prompt:
        step, place = divmod(int(index), self._size)
        prompt = self._prompts[(step * self._hosts + self._host) * self._size + place]
        assert prompt is not None  # of a data set without filters
        return prompt

    def __repr__(self) -> str:
        return f"_Share({self._size}, {self._host}, {self._hosts})"


def drawn(batches: grain.DatasetIterator[list[Prompt]]) -> int:
    """Prompts that an iterator of `iterate` has yielded since the run began."""
    return int(batches.get_state()["next_index"])


def go_on(batches: grain.DatasetIterator[list[Prompt]], drawn: int) -> None:
    """Moves an iterator of `iterate` behind the first `drawn` prompts of its host."""
    batches.set_state({"next_index": drawn})


def evaluation_prompts(config: Config, tokenizer: Tokenizer, count: int) -> dict[str, list[Prompt]]:
    """The first `count` prompts of each evaluation set by its name, the same for every run.

    Raises:
        UserError: a prepared set is not there or damaged, or one of its prompts is longer than
            `rollout.max_prompt_tokens`: a benchmark without its long questions is another one.
    """
    directory = Path(config.dataset.directory)
    if config.dataset.name:
        sets = {name: open_set(directory, name) for name in config.dataset.evaluation}
        found = {
            name: [
                make_prompt(config, tokenizer, examples.example(index))
                for index in range(min(count, examples.size))
            ]
            for name, examples in sets.items()
        }
        for prompts in found.values():
            _require_fit(prompts, prompt_columns(config))
        return found
    return {
        config.task.name: [
            make_prompt(config, tokenizer, make_example(config.task, "evaluation", index))
            for index in range(count)
        ]
    }


def prompt_columns(config: Config) -> int:
    """P, the width that prompts are padded to."""
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
    """Right-padded right completions, each closed by the end-of-sequence token.

    Returns:
        int32 tokens [N, R'] and bool validity [N, R'], R' = `completion_tokens(config)`.

    Raises:
        UserError: the tokenizer needs more than a token a character.
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
    """Rows of token ids as int32 [N, width] and their validity, padded on one side."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, columns] = row
        valid[index, columns] = True
    return tokens, valid
