"""What a configuration's value must be, said in one line that names the field."""

from __future__ import annotations

import math
import typing

from occ_jax.errors import UserError


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError unless `condition`; `allowed` completes "it must be"."""
    if not condition:
        raise UserError(f"{name} is {value!r}; it must be {allowed}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises UserError unless all named fields are positive and finite."""
    for name in names:
        value = getattr(config, name)
        require(_is_number(value) and value > 0, f"{section}.{name}", value, "positive")


def require_not_negative(section: str, config: object, *names: str) -> None:
    """Raises UserError unless all named fields are 0 or more and finite."""
    for name in names:
        value = getattr(config, name)
        require(_is_number(value) and value >= 0, f"{section}.{name}", value, "0 or more")


def require_choice(section: str, config: object, name: str, choices: object) -> None:
    """Raises UserError unless a field has a value of the Literal `choices`."""
    allowed = typing.get_args(choices)
    value = getattr(config, name)
    require(value in allowed, f"{section}.{name}", value, f"one of {', '.join(allowed)}")


def _is_number(value: object) -> bool:
    """A finite one; a config file may say anything."""
    return isinstance(value, int | float) and math.isfinite(value)
