"""Generated digit tasks: endless, deterministic, verifiable.

An example is a function of (task, split, seed, stream, index); a run's seed is its stream. Train
and evaluation examples never share a prompt: a prompt's checksum decides its split, and generation
repeats until the split is the requested one. Leaves batching to `occ_jax.data.pipeline`.
"""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

import numpy as np

from occ_jax.config import TaskConfig
from occ_jax.data.examples import Example

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 8  # one prompt in 8 belongs to the evaluation split


class _Problem(NamedTuple):
    prompt: str
    completion: str  # right, with every intermediate step
    answer: str  # the end of every right completion


def _reverse(rng: np.random.Generator, config: TaskConfig) -> _Problem:
    digits = "".join(map(str, rng.integers(0, 10, config.digits)))
    return _Problem(f"{digits}=", digits[::-1], digits[::-1])


def _sort(rng: np.random.Generator, config: TaskConfig) -> _Problem:
    digits = "".join(map(str, rng.integers(0, 10, config.digits)))
    ordered = "".join(sorted(digits))
    return _Problem(f"{digits}=", ordered, ordered)


def _addition(rng: np.random.Generator, config: TaskConfig) -> _Problem:
    width = config.digits
    first, second = (int(x) for x in rng.integers(0, 10**width, 2))
    # Least significant digit first, the order in which carries are known.
    total = f"{first + second:0{width + 1}d}"[::-1]
    return _Problem(f"{first:0{width}d}+{second:0{width}d}=", total, total)


def _chained_sum(rng: np.random.Generator, config: TaskConfig) -> _Problem:
    terms = [int(x) for x in rng.integers(0, 10**config.digits, config.terms)]
    totals = [str(x) for x in np.cumsum(terms)]
    prompt = "+".join(f"{term:0{config.digits}d}" for term in terms)
    return _Problem(f"{prompt}=", ">".join(totals[1:]), totals[-1])


_GENERATORS = {
    "reverse_digits": _reverse,
    "sort_digits": _sort,
    "addition": _addition,
    "chained_sum": _chained_sum,
}


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, by its checksum."""
    return "evaluation" if zlib.crc32(prompt.encode()) % EVALUATION_SHARE == 0 else "train"


def make_example(config: TaskConfig, split: Split, index: int, stream: int = 0) -> Example:
    """Example `index` of a split; the same (seed, stream, index) gives the same one, anywhere.

    The generator is keyed by (seed, stream, index) and draws problems until the prompt's checksum
    lies in the split: about 8 draws for the evaluation split, 8/7 for training.
    """
    rng = np.random.Generator(np.random.Philox(key=[config.seed << 32 | stream, index]))
    while True:
        prompt, completion, answer = _GENERATORS[config.name](rng, config)
        if split_of(prompt) == split:
            return Example(prompt, answer, config.name, f"{split}-{stream}-{index}", completion)


def has_unique_completion(config: TaskConfig) -> bool:
    """Whether exactly one completion of a prompt is right.

    Then the probability of a right completion is that of one token sequence: the exact objective,
    which can be computed instead of sampled. The verifier of `chained_sum` judges only the last
    number, so its completions may differ before it.
    """
    return config.name != "chained_sum"


def prompt_tokens(config: TaskConfig) -> int:
    """Length of every prompt of a task in tokens, which are characters."""
    match config.name:
        case "addition":
            return 2 * config.digits + 2
        case "chained_sum":
            return config.terms * (config.digits + 1)
        case _:
            return config.digits + 1


def completion_tokens(config: TaskConfig) -> int:
    """Length of the longest right completion in tokens, with the end-of-sequence token."""
    match config.name:
        case "addition":
            return config.digits + 2
        case "chained_sum":
            widest = len(str(config.terms * (10**config.digits - 1)))
            return (config.terms - 1) * (widest + 1)
        case _:
            return config.digits + 1
