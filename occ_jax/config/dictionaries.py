"""Configs as dictionaries of JSON values and back, and the fields in which two configs differ."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from occ_jax.config.checks import field_hints, section_type
from occ_jax.config.experiment import Config
from occ_jax.config.model import ModelConfig
from occ_jax.errors import UserError

_T = TypeVar("_T")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`, also after a JSON round trip (lists become tuples).

    Raises:
        UserError: a field does not exist, or a value is not allowed.
    """
    return _build(Config, values, "")


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """`from_dict` for the model section alone."""
    return _build(ModelConfig, values, "model.")


def _build(kind: type[_T], values: dict[str, Any], path: str) -> _T:
    hints = field_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"the config has no {'field' if path else 'section'} {path}{name}")
        part = section_type(hints[name])
        if part is not None and isinstance(value, dict):
            value = _build(part, value, f"{path}{name}.")
        arguments[name] = _to_tuples(value)
    return kind(**arguments)


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list) else value


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, as {"section.field": (old, new)}."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    names = dict.fromkeys((*before, *after))
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, {"section.field": value}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        name = path + name
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
