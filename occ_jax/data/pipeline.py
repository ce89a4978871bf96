"""Grain pipelines: from (seed, index) to batches of examples, resumable at the exact next one."""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from occ_jax.config import TaskConfig
from occ_jax.data.tasks import (
    Example,
    Split,
    completion_tokens,
    make_example,
    prompt_tokens,
)
from occ_jax.data.tokenizer import EOS_ID, PAD_ID, encode

# Generated on demand, so the length only has to exceed what any run consumes.
_ENDLESS = 2**31 - 1


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


def training_iterator(
    config: TaskConfig, batch_size: int, stream: int = 0
) -> grain.DatasetIterator[list[Example]]:
    """Batches of training examples, in the order of their index in `stream` (a run's seed).

    The iterator's state (`get_state`, `set_state`) is one integer and goes into checkpoints.
    Nothing is shuffled: examples of consecutive indices are already independent.
    """
    dataset = grain.MapDataset.source(TaskSource(config, "train", stream))
    return iter(
        dataset.to_iter_dataset(grain.ReadOptions(num_threads=0)).batch(batch_size, batch_fn=list)
    )


def evaluation_examples(config: TaskConfig, count: int) -> list[Example]:
    """The first `count` examples of the evaluation split, the same for every run of a task."""
    return [make_example(config, "evaluation", index) for index in range(count)]


def encode_prompts(
    config: TaskConfig, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded prompts.

    Returns:
        int32 tokens [N, P] and bool validity [N, P].
    """
    return pad([encode(e.prompt) for e in examples], prompt_tokens(config), left=True)


def encode_completions(
    config: TaskConfig, examples: Sequence[Example]
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded right completions, each closed by the end-of-sequence token.

    Returns:
        int32 tokens [N, R'] and bool validity [N, R'], R' = `completion_tokens(config)`.
    """
    rows = [[*encode(e.completion), EOS_ID] for e in examples]
    return pad(rows, completion_tokens(config), left=False)


def pad(rows: list[list[int]], width: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as int32 [N, width] and their validity, padded on one side."""
    tokens = np.full((len(rows), width), PAD_ID, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, columns] = row
        valid[index, columns] = True
    return tokens, valid
