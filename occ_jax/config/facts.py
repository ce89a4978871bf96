"""Facts about a config field that its type does not say, declared beside the field.

A fact says that something does not depend on the field's value. A field without facts therefore
gets the careful answer everywhere: a run cannot be resumed with another value, and parameters,
completions and compiled programs depend on it. A fact of a section holds for all its fields.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

from occ_jax.config.checks import field_hints, section_type

_T = TypeVar("_T")


class Fact(enum.Flag):
    """Statements about a field; combine them with `|`."""

    MAY_CHANGE = enum.auto()
    """A run may be resumed with another value."""
    SAME_MODEL = enum.auto()
    """Parameters that were trained with one value can be used with another."""
    SAME_WARM_UP = enum.auto()
    """The supervised warm-up ends in the same parameters, up to rounding."""
    SAME_SAMPLES = enum.auto()
    """An evaluation samples the same completions."""
    SAME_PROGRAM = enum.auto()
    """The compiled programs do not read it; a fact of whole sections only."""
    NOT_IN_CHECKPOINT = enum.auto()
    """A Hugging Face checkpoint leaves it open, so the config decides."""


_NONE = Fact(0)
COST_ONLY = Fact.MAY_CHANGE | Fact.SAME_MODEL | Fact.SAME_WARM_UP | Fact.NOT_IN_CHECKPOINT
"""A field of the model that decides memory and speed, and of the results only the rounding."""


def setting(default: _T, facts: Fact = _NONE) -> _T:
    """A dataclass field with a default value and facts."""
    return dataclasses.field(default=default, metadata={"facts": facts})


@functools.cache
def fields_with(fact: Fact, section: type[Any]) -> frozenset[str]:
    """Names of all fields below a config dataclass that have `fact`, such as "model.moe.router"."""
    return frozenset(name for name, facts in _walk(section) if fact in facts)


def _walk(section: type[Any], path: str = "", facts: Fact = _NONE) -> Iterator[tuple[str, Fact]]:
    hints = field_hints(section)
    for field in dataclasses.fields(section):
        name, joined = path + field.name, facts | field.metadata.get("facts", _NONE)
        yield name, joined
        part = section_type(hints[field.name])
        if part is not None:
            yield from _walk(part, f"{name}.", joined)
