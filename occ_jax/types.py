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
| G | completions per prompt (group size) |
| M | micro-batches per mini-batch |

Prompts are padded on the left, so that every row's response starts at column P and all decoding
writes one cache column per step. Arrays of the response are [B, R] and aligned by the token that
is predicted: for every head, column j belongs to the token in column P + j of `tokens`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from jaxtyping import Array, Bool, Float, Int, Key

Params = dict[str, Any]
"""{"trunk": θ, "mtp": φ}: nested dictionaries of arrays."""


class TrainState(NamedTuple):
    """Everything on device that an update reads and writes; a checkpoint adds the data iterator."""

    params: Params
    opt_state: Any  # with the coefficient λ and its EMAs
    step: Int[Array, ""]  # int32, updates done
    key: Key[Array, ""]  # constant: consumers fold in their own number and the step


class Rollout(NamedTuple):
    """Completions as sampled. Rows of one prompt are neighbours: B = prompts x G."""

    tokens: Int[Array, "B T"]  # int32, pad outside `valid`
    valid: Bool[Array, "B T"]  # real tokens, the end-of-sequence token included
    response_mask: Bool[Array, "B R"]  # valid[:, P:]: 1 = trained on
    log_probs: Float[Array, "B R"]  # log π of the sampled tokens at the sampling temperature
    auxiliary_log_probs: Float[Array, "K B R"] | None  # of the same tokens, by each module


class Batch(NamedTuple):
    """A rollout, or a mini-batch of it, as the train step gets it."""

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    response_mask: Bool[Array, "B R"]
    old_log_probs: Float[Array, "B R"]
    old_auxiliary_log_probs: Float[Array, "K B R"] | None
    reference_log_probs: Float[Array, "B R"] | None  # None without a KL penalty
    weights: Float[Array, "B R"] | None  # of each token in the policy losses; None for 1
    advantages: Float[Array, " B"]


RowFields = TypeVar("RowFields", Rollout, Batch)


@functools.cache
def row_axes(kind: type[Rollout] | type[Batch]) -> dict[str, int]:
    """The axis of every field that holds rows: the place of B in the field's annotation."""
    axes: dict[str, int] = {}
    for name, hint in get_type_hints(kind).items():
        array = (get_args(hint) or (hint,))[0]  # the first option of `X | None`
        axes[name] = array.dim_str.split().index("B")
    return axes


def map_rows(function: Callable[[Any, int], Any], fields: RowFields) -> RowFields:
    """Applies `function(array, axis of the rows)` to every field that is not None."""
    axes, arrays = row_axes(type(fields)), fields._asdict()
    return fields._replace(
        **{name: function(x, axes[name]) for name, x in arrays.items() if x is not None}
    )
