"""Checked access to the keys of config.json, and the keys that all families share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from occ_jax.config import YarnConfig
from occ_jax.errors import UserError
from occ_jax.models.huggingface.tensors import Json

_T = TypeVar("_T")
_REQUIRED: Any = object()
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Values:
    """The keys of a config.json, or of an object in it; null counts as missing."""

    path: Path
    values: Json
    inside: str = ""
    """Prefix of the object's keys in messages: its name and a dot."""

    def get(self, key: str, kind: type[_T], default: Any = _REQUIRED) -> _T:
        """The value of a key.

        Raises:
            UserError: the value is of another kind, or is missing and has no default.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: {self.inside}{key} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.refuse(key, value, _KINDS[kind])
        return cast("_T", value)

    def only(self, key: str, allowed: object, *, required: bool = False) -> None:
        """Raises UserError unless the value is supported, or is missing and not required."""
        value = self.values.get(key)
        if value != allowed and (required or value is not None):
            raise self.refuse(key, value, f"{allowed!r}, all that is supported")

    def refuse(self, key: str, value: object, allowed: str) -> UserError:
        """The error about the value of a key."""
        return UserError(f"{self.path}: {self.inside}{key} is {value!r}; it must be {allowed}")

    def part(self, key: str) -> Values:
        """An object in the config; empty if it is missing."""
        return Values(self.path, self.get(key, dict, {}), f"{self.inside}{key}.")


def basics(
    values: Values, *, rope_fraction: float = 1.0, width: str = "intermediate_size"
) -> dict[str, Any]:
    """Fields of `ModelConfig` that all families share; `width` is the feed-forward width's key."""
    values.only("hidden_act", "silu")
    heads, size = values.get("num_attention_heads", int), values.get("hidden_size", int)
    return {
        "hidden_size": size,
        "intermediate_size": values.get(width, int),
        "num_layers": values.get("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads", int, heads),
        "head_dim": values.get("head_dim", int, size // max(heads, 1)),
        "vocab_size": values.get("vocab_size", int),
        "rms_norm_eps": values.get("rms_norm_eps", float),
        "tie_embeddings": values.get("tie_word_embeddings", bool, False),
        **_rope(values, rope_fraction),
    }


def _rope(values: Values, fraction: float) -> dict[str, Any]:
    """Fields for rotary positions, with the keys of published files or of transformers 5."""
    new, old = values.part("rope_parameters"), values.part("rope_scaling")
    scaling = new if new.values else old
    kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if kind not in ("default", "yarn"):
        key = "rope_type" if "rope_type" in scaling.values else "type"
        raise scaling.refuse(key, kind, "'default' or 'yarn'")
    fraction = values.get("partial_rotary_factor", float, fraction)
    return {
        "rope_theta": new.get("rope_theta", float, values.get("rope_theta", float, 10_000.0)),
        "rope_fraction": new.get("partial_rotary_factor", float, fraction),
        "yarn": _yarn(values, scaling) if kind == "yarn" else None,
    }


def _yarn(values: Values, scaling: Values) -> YarnConfig:
    """YaRN; its two mscales scale sines and cosines and, in DeepSeek, the softmax."""
    factor = scaling.get("factor", float)
    mscale = scaling.get("mscale", float, 0.0)
    all_dimensions = scaling.get("mscale_all_dim", float, 0.0)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    ratio = magnitude(1.0)
    if mscale and all_dimensions:
        ratio = magnitude(mscale) / magnitude(all_dimensions)
    if scaling.values.get("original_max_position_embeddings") is None:
        positions = values.get("max_position_embeddings", int)
    else:
        positions = int(scaling.get("original_max_position_embeddings", float))
    return YarnConfig(
        factor=factor,
        original_max_positions=positions,
        beta_fast=scaling.get("beta_fast", float, 32.0),
        beta_slow=scaling.get("beta_slow", float, 1.0),
        attention_factor=scaling.get("attention_factor", float, ratio),
        # Only latent attention uses it, as in the published models.
        softmax_factor=magnitude(all_dimensions) ** 2 if all_dimensions else 1.0,
        truncate=scaling.get("truncate", bool, True),
    )
