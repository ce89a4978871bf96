"""The reward of the digit tasks: 1 for a completion whose answer is the right one, else 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from occ_jax.config import TaskConfig
from occ_jax.data.tasks import Example, has_unique_completion
from occ_jax.data.tokenizer import EOS_ID, encode


def exact_match(
    config: TaskConfig, examples: Sequence[Example], completions: np.ndarray
) -> np.ndarray:
    """Scores completions of a group size G.

    A completion cut by the length limit (no end-of-sequence token) earns nothing, whatever it
    spells. With intermediate steps only what follows the last ">" is compared. Tokens are compared
    and not text, which drops the padding that a policy may have sampled inside a completion.

    Args:
        config: the task.
        examples: P problems.
        completions: int token ids [P, G, R].

    Returns:
        float32 [P, G], 0 or 1.
    """
    scores = np.zeros(completions.shape[:2], np.float32)
    whole = has_unique_completion(config)
    (separator,) = encode(">")
    for row, example in enumerate(examples):
        answer = encode(example.answer)
        for column, ids in enumerate(completions[row].tolist()):
            if EOS_ID not in ids:
                continue
            given = ids[: ids.index(EOS_ID)]
            if not whole and separator in given:
                given = given[len(given) - given[::-1].index(separator) :]
            scores[row, column] = given == answer
    return scores
