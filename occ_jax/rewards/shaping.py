"""Shaping of scores between the verifier and the advantages: length penalty, group filter.

Host code on NumPy: it runs between sampling and the update, when dynamic sampling decides whether
it needs more prompts. Leaves scoring to the verifiers and drawing prompts to the rollout.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Integer, Real


def overlong_penalty(
    lengths: Integer[np.ndarray, "..."], *, max_tokens: int, buffer_tokens: int, factor: float = 1.0
) -> Float[np.ndarray, "..."]:
    """Penalises completions that reach the last `buffer_tokens` before the length limit.

    penalty = min((max_tokens - buffer_tokens - n) / buffer_tokens * factor, 0): none up to
    max_tokens - buffer_tokens, then linear down to -factor at max_tokens. It is added to the score.

    Args:
        lengths: n, the length of each completion in tokens (not characters), integers.
        max_tokens: the longest completion generated, tokens.
        buffer_tokens: number of the last tokens that are penalised.
        factor: the penalty at max_tokens, in the unit of the score.

    Returns:
        Penalties <= 0, float32, shaped like `lengths`. There is no lower bound beyond max_tokens,
        which generation does not exceed.

    Raises:
        ValueError: `lengths` is not of integers, `buffer_tokens` is not within 1 … `max_tokens`, or
            `factor` is negative or not finite.

    Example:
        >>> overlong_penalty(np.array([4096, 6144, 8192]), max_tokens=8192, buffer_tokens=4096)
        array([ 0. , -0.5, -1. ], dtype=float32)

    Source:
        DAPO, arXiv 2503.14476, section 3.4.
    """
    lengths = np.asarray(lengths)
    if not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths has dtype {lengths.dtype}; allowed: integers (tokens)")
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(
            f"buffer_tokens={buffer_tokens}; allowed: 1 to max_tokens={max_tokens}, both included"
        )
    if not (factor >= 0 and math.isfinite(factor)):
        raise ValueError(f"factor={factor}; allowed: a finite number >= 0")
    # Through float64, since unsigned lengths would wrap around below the free stretch.
    slack_tokens = max_tokens - buffer_tokens - lengths.astype(np.float64)
    return np.asarray(np.minimum(slack_tokens / buffer_tokens * factor, 0.0), dtype=np.float32)


def informative_groups(
    accuracies: Real[np.ndarray, "P G"] | Bool[np.ndarray, "P G"],
) -> Bool[np.ndarray, "P"]:
    """Marks the groups that dynamic sampling keeps: those whose completions differ in score.

    keep = std(accuracies) > 0.

    Args:
        accuracies: scores of the G completions of each of P prompts, without length penalties:
            these differ inside a group that is all right or all wrong, and such a group teaches
            brevity, not correctness.

    Returns:
        One boolean per prompt. Groups of one completion are never kept.

    Raises:
        ValueError: `accuracies` is not two-dimensional, or its groups are empty.

    Source:
        DAPO, arXiv 2503.14476, section 3.2.
    """
    accuracies = np.asarray(accuracies)
    if accuracies.ndim != 2 or accuracies.shape[1] == 0:
        raise ValueError(
            f"accuracies has shape {accuracies.shape}; allowed: [P, G], prompts by one or more "
            "completions"
        )
    # max > min is std > 0 without its rounding: np.std of equal numbers can come out above zero.
    return accuracies.max(axis=1) > accuracies.min(axis=1)
