"""The strictest reward: 1 for a completion whose answer is spelled exactly as the right one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from occ_jax.config import Config
from occ_jax.data.examples import Example
from occ_jax.data.tasks import answer_separator
from occ_jax.data.tokenizer import Tokenizer, until_end


def exact_match(
    config: Config, tokenizer: Tokenizer, examples: Sequence[Example], completions: np.ndarray
) -> np.ndarray:
    """Scores completions of a group size G.

    A completion cut by the length limit (no end-of-sequence token) earns nothing, whatever it
    spells. With intermediate steps only what follows the last ">" is compared. Text is compared,
    special tokens spelled out: padding that a policy sampled inside a completion is not overlooked.

    Args:
        config: the digit task or prepared set.
        tokenizer: of the completions.
        examples: P problems.
        completions: int token ids [P, G, R].

    Returns:
        float32 [P, G], 0 or 1.
    """
    separator = "" if config.dataset.name else answer_separator(config.task)
    scores = np.zeros(completions.shape[:2], np.float32)
    for row, example in enumerate(examples):
        for column, ids in enumerate(completions[row].tolist()):
            given, ended = until_end(tokenizer, ids)
            if not ended:
                continue
            text = tokenizer.decode(given)
            if separator:
                text = text.rpartition(separator)[2]
            scores[row, column] = text == example.answer
    return scores
