"""Checks of config values; an error is one line that names the field.

A section checks every field against the field's type when it is made: `Literal` lists the allowed
values, and `PositiveInt` and its like add bounds to a number. Rules that join several fields stay
with the section, which states them with `require`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from occ_jax.errors import UserError


@dataclass(frozen=True)
class Bound:
    """A bound on a number, as in `Annotated[int, Bound("2 or more", lambda x: x >= 2)]`."""

    allowed: str
    """Completes "it must be"."""
    holds: Callable[[float], bool]


_POSITIVE = Bound("positive", lambda x: x > 0)
_NOT_NEGATIVE = Bound("0 or more", lambda x: x >= 0)
_DECAY = Bound("at least 0 and below 1", lambda x: 0 <= x < 1)
_SEED = Bound("between 0 and 2^31 - 1", lambda x: 0 <= x < 2**31)
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE]
Decay = Annotated[float, _DECAY]
Seed = Annotated[int, _SEED]

_KINDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string"}


class Section:
    """Base of all config dataclasses; `path` is how messages name one, "" for the whole config."""

    path: ClassVar[str]

    def __init_subclass__(cls, path: str) -> None:
        cls.path = path

    def __post_init__(self) -> None:
        for name, hint in field_hints(type(self)).items():
            value = getattr(self, name)
            allowed = _refused(hint, value)
            if allowed:
                raise self.refuse(name, allowed, value)

    def require(self, condition: bool, name: str, allowed: str) -> None:
        """Raises UserError unless `condition`; `name` may be dotted, as in "rollout.group_size"."""
        if not condition:
            raise self.refuse(name, allowed, operator.attrgetter(name)(self))

    def refuse(self, name: str, allowed: str, value: object) -> UserError:
        """The error for a value; `allowed` completes "it must be"."""
        full_name = f"{self.path}.{name}" if self.path else name
        return UserError(f"{full_name} is {value!r}; it must be {allowed}")


@functools.cache
def field_hints(section: type[Any]) -> dict[str, Any]:
    """Types of a dataclass's fields, bounds included."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def section_type(hint: Any) -> type[Any] | None:
    """The config dataclass in a field's type, which may be optional; None for a plain value."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _refused(hint: Any, value: object) -> str:
    """The values that `hint` allows, in words, or "" if `value` is one of them."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        number, bound = options
        return _refused(number, value) or ("" if bound.holds(value) else bound.allowed)
    if kind in (typing.Union, types.UnionType):  # always of one type and None
        allowed = "" if value is None else _refused(options[0], value)
        return allowed and f"{allowed}, or None"
    if kind is Literal:
        return "" if value in options else f"one of {', '.join(options)}"
    if kind is tuple:
        return "" if _is_tuple(options, value) else f"a {hint}"
    if isinstance(value, bool):
        right = hint is bool  # True is an int to Python
    elif hint is float:
        right = isinstance(value, int | float) and abs(value) < math.inf  # False for NaN
    else:
        right = isinstance(value, hint)
    return "" if right else _KINDS.get(hint) or f"a {hint.__name__}"


def _is_tuple(options: tuple[Any, ...], value: object) -> bool:
    if not isinstance(value, tuple):
        return False
    kinds = options[:1] * len(value) if options[-1] is Ellipsis else options
    return len(value) == len(kinds) and not any(map(_refused, kinds, value))
