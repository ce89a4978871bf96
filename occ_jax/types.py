"""The dimension alphabet and the pytrees that flow through one step.

Dimensions, everywhere in this package:

| letter | meaning |
|---|---|
| B | rows (sequences) |
| T | tokens of a whole sequence, prompt and response: T = P + R |
| P, R | tokens of the left-padded prompt, of the right-padded response |
| S | slots of a KV cache |
| V | vocabulary |
| D | hidden size |
| H, N, C | query heads, key-value heads, head dimension |
| K | MTP modules |
| G | completions a prompt (group size) |
| M | micro-batches a mini-batch |

Prompts are padded on the left, so that every row's response starts at column P and all decoding
writes one cache column a step. Arrays of the response are [B, R] and aligned by the token they
speak of: column j belongs to the token in column P + j of `tokens`, for every head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Array, Bool, Float, Int, Key

Params = dict[str, Any]
"""{"trunk": theta, "mtp": phi}: nested dictionaries of arrays."""


class TrainState(NamedTuple):
    """All that one update reads and writes on device; a checkpoint adds the data iterator."""

    params: Params
    opt_state: Any  # the coefficient and its EMAs live here
    step: Int[Array, ""]  # int32, updates done
    key: Key[Array, ""]  # never advanced: consumers fold in what they are and the step


class Rollout(NamedTuple):
    """Completions as sampled. Rows of one prompt are neighbours: B = prompts x G."""

    tokens: Int[Array, "B T"]  # int32, pad outside `valid`
    valid: Bool[Array, "B T"]  # real tokens, the end-of-sequence token included
    response_mask: Bool[Array, "B R"]  # valid[:, P:]: 1 = trained on
    log_probs: Float[Array, "B R"]  # log pi of the sampled tokens at the sampling temperature
    auxiliary_log_probs: Float[Array, "K B R"] | None  # the same tokens by each MTP module


class Batch(NamedTuple):
    """A rollout, or a mini-batch of it, as the train step reads it."""

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    response_mask: Bool[Array, "B R"]
    old_log_probs: Float[Array, "B R"]
    old_auxiliary_log_probs: Float[Array, "K B R"] | None
    reference_log_probs: Float[Array, "B R"] | None  # None without a KL penalty
    weights: Float[Array, "B R"] | None  # of each token's policy losses; None for ones
    advantages: Float[Array, " B"]


Rows = TypeVar("Rows", Rollout, Batch)


def map_rows(function: Callable[[Any, int], Any], rows: Rows) -> Rows:
    """Applies `function(array, dimension of the rows)` to every field that is there."""
    return rows._replace(
        **{
            name: function(array, 1 if name.endswith("auxiliary_log_probs") else 0)
            for name, array in rows._asdict().items()
            if array is not None
        }
    )
