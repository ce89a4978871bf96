"""Statistics of repeated answers to questions: pass@k, maj@k, intervals, paired differences.

Pure functions on NumPy arrays. An evaluation set is a sample of questions, so every interval is
over questions: an estimator gives one number a question, and the variance of these numbers includes
the randomness of the answers (arXiv 2411.00640, section 2.2). Leaves records and tables to
`occ_jax.evaluation.summary`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

_Z = 1.959963984540054  # the 97.5% quantile of the normal distribution
MAX_ANSWERS = 1000  # a question, for maj@k with k < n; larger binomial coefficients overflow


class Interval(NamedTuple):
    """A mean with half of its normal 95% confidence interval; NaN if it is undefined."""

    mean: float
    half_width: float


class Paired(NamedTuple):
    """Differences of two policies on the same questions."""

    difference: Interval  # second minus first
    better: int  # questions on which the second policy has the higher number
    worse: int
    equal: int


def pass_at_k(right: Integer[np.ndarray, " Q"], n: int, k: int) -> Float[np.ndarray, " Q"]:
    r"""Unbiased estimate, for each question, of the probability that one of k answers is right.

    With c of n answers right it is the share of the k-subsets that contain a right answer,

        1 - C(n-c, k) / C(n, k)  =  1 - \prod_{i=n-c+1}^{n} (1 - k/i).

    Args:
        right: c, the number of right answers to each question.
        n: answers a question.
        k: 1 to n. pass@1 is c / n, the question's share of right answers, as in avg@n.

    Raises:
        ValueError: k or a count is out of range.

    Example:
        >>> pass_at_k(np.array([0, 1, 2, 4]), n=4, k=2)
        array([0.        , 0.5       , 0.83333333, 1.        ])

    Source:
        Chen et al., arXiv 2107.03374, section 2.1.
    """
    _require_k(n, k)
    right = np.asarray(right)
    if right.size and not (right.min() >= 0 and right.max() <= n):
        raise ValueError(f"counts from {right.min()} to {right.max()}; allowed: 0 to n={n}")
    estimates = np.ones(right.shape)
    for index, count in enumerate(right.tolist()):
        if n - count >= k:
            estimates[index] = 1.0 - math.prod(1.0 - k / i for i in range(n - count + 1, n + 1))
    return estimates


def majority_at_k(given: Sequence[str | None], scores: Sequence[int | float], k: int) -> float:
    """Unbiased estimate of the score of the most frequent of k answers to a question.

    It is the mean over all k-subsets of the n answers. In each subset the most frequent answer wins
    and gives its score; answers that tie share the win equally. Completions without an answer do
    not vote, and a subset of such completions alone scores 0.

    Args:
        given: the n answers, normalised; None for a completion without an answer.
        scores: their scores; an answer that occurs several times has the mean of its scores.
        k: 1 to n.

    Raises:
        ValueError: k is out of range, n exceeds `MAX_ANSWERS` while k < n, or `given` and `scores`
            differ in length.

    Example:
        >>> majority_at_k(["34", "34", "12"], [1, 1, 0], k=3)
        1.0
        >>> majority_at_k(["34", "34", "12"], [1, 1, 0], k=2)  # of three pairs, two are ties
        0.6666666666666666
    """
    n = len(given)
    _require_k(n, k)
    if len(scores) != n:
        raise ValueError(f"{n} answers with {len(scores)} scores")
    by_answer: dict[str, list[float]] = {}
    for answer, score in zip(given, scores, strict=True):
        if answer is not None:
            by_answer.setdefault(answer, []).append(float(score))
    counts = list(map(len, by_answer.values()))
    values = [sum(answer_scores) / len(answer_scores) for answer_scores in by_answer.values()]
    if k == n:
        highest = max(counts, default=0)
        winners = [value for value, count in zip(values, counts, strict=True) if count == highest]
        return sum(winners) / len(winners) if winners else 0.0
    if n > MAX_ANSWERS:
        raise ValueError(f"{n} answers; allowed with k < n: up to {MAX_ANSWERS}")
    total = 0.0
    for index, value in enumerate(values):
        if value != 0:
            others = counts[:index] + counts[index + 1 :]
            total += value * _chance_to_win(counts[index], others, n - sum(counts), k)
    return total


def _chance_to_win(own: int, others: Sequence[int], silent: int, k: int) -> float:
    """The share of the k-subsets that an answer wins; a tie of m answers counts as 1/m.

    For each number of votes that the answer may have, a polynomial counts the subsets in which no
    other answer has more. Its coefficients [ties, size] are updated answer by answer.
    """
    total = 0.0
    for votes in range(1, min(own, k) + 1):
        rest, most_ties = k - votes, k // votes - 1
        ways = np.zeros((most_ties + 1, rest + 1))
        ways[0] = [math.comb(silent, size) for size in range(rest + 1)]
        for count in others:
            fewer = [math.comb(count, size) for size in range(min(votes - 1, count, rest) + 1)]
            updated = np.stack([np.convolve(row, fewer)[: rest + 1] for row in ways])
            if count >= votes and votes <= rest:
                updated[1:, votes:] += math.comb(count, votes) * ways[:-1, : rest + 1 - votes]
            ways = updated
        shared = ways[:, rest] / np.arange(1, most_ties + 2)
        total += math.comb(own, votes) * float(shared.sum())
    return total / math.comb(own + sum(others) + silent, k)


def interval(per_question: Float[np.ndarray, " Q"]) -> Interval:
    """The mean over Q questions and its interval; its standard error is std / sqrt(Q), ddof 1.

    Example:
        >>> mean, half_width = interval(np.array([0.0, 1.0, 0.5, 0.5]))  # std 0.408, SE 0.204
        >>> mean, round(half_width, 3)
        (0.5, 0.4)
    """
    count = len(per_question)
    if count < 2:
        return Interval(float(per_question[0]) if count else math.nan, math.nan)
    half_width = _Z * np.std(per_question, ddof=1) / math.sqrt(count)
    return Interval(float(np.mean(per_question)), float(half_width))


def paired(first: Float[np.ndarray, " Q"], second: Float[np.ndarray, " _"]) -> Paired:
    """The mean difference between two policies, question by question.

    The difficulty of a question, which both policies share, cancels, so the interval is narrower
    than that of two independent means.

    Raises:
        ValueError: the numbers of questions differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} questions against {len(second)}")
    differences = np.asarray(second) - np.asarray(first)
    better, worse = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return Paired(interval(differences), better, worse, len(differences) - better - worse)


def mean_of_sets(sets: Sequence[Interval]) -> Interval:
    """The mean over evaluation sets with equal weights, as papers report it.

    The sets are fixed and their questions independent, so the variances add.
    """
    if not sets:
        return Interval(math.nan, math.nan)
    return Interval(
        sum(interval.mean for interval in sets) / len(sets),
        math.sqrt(sum(interval.half_width**2 for interval in sets)) / len(sets),
    )


def _require_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k}; allowed: 1 to n={n}")
