"""Grain pipelines: from examples to batches of prompts, resumable at the exact next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from occ_jax.config import Config, TaskConfig
from occ_jax.data.examples import Example, Prompt, make_prompt
from occ_jax.data.tasks import Split, completion_tokens, make_example, prompt_tokens
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.errors import UserError

# Generated on demand, so the length only has to exceed what any run consumes.
_ENDLESS = 2**31 - 1


class TrainingPrompts(NamedTuple):
    """What a run trains on."""

    prompts: grain.MapDataset[Prompt]  # endless, in the order of training
    epoch: int | None  # prompts until one comes again; None for a task, which makes new ones
    overlong: int  # prompts left out for their length


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
    """The prompts of a run, in an order that `run.seed` decides."""
    return TrainingPrompts(task_prompts(config, tokenizer, config.run.seed), None, 0)


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

    Host h of H gets positions h, h + H, h + 2H, … of the common order, so that step s of all hosts
    together is the same H·B prompts in a row, whatever H is and wherever epochs end. The
    iterator's state (`get_state`, `set_state`) is one integer, the same on every host, and goes
    into checkpoints.

    Args:
        prompts: endless.
        batch_size: B, prompts a host and step.
        host: h, this process's index.
        num_hosts: H.
    """
    mine = prompts[host::num_hosts].to_iter_dataset(grain.ReadOptions(num_threads=0))
    return iter(mine.batch(batch_size, batch_fn=list))


def evaluation_prompts(config: Config, tokenizer: Tokenizer, count: int) -> dict[str, list[Prompt]]:
    """The first `count` prompts of each evaluation set by its name, the same for every run."""
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
    for prompt in prompts:
        if len(prompt.tokens) > width:
            raise UserError(
                f"prompt {prompt.example.id} of {prompt.example.source} has {len(prompt.tokens)} "
                f"tokens; rollout.max_prompt_tokens allows {width}"
            )
    return pad([prompt.tokens for prompt in prompts], width, tokenizer.pad_id, left=True)


def encode_completions(
    config: TaskConfig, tokenizer: Tokenizer, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded right completions, each closed by the end-of-sequence token.

    Returns:
        int32 tokens [N, R'] and bool validity [N, R'], R' = `completion_tokens(config)`.
    """
    rows = [[*tokenizer.encode(e.completion), tokenizer.eos_ids[0]] for e in examples]
    return pad(rows, completion_tokens(config), tokenizer.pad_id, left=False)


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
