"""Parsers of right answers: from a publisher's value to the text that verifiers read.

Each function returns the answer's text. It raises ValueError if the value is not of its kind; the
message completes the sentence "column 'value' ...". Leaves comparison to the verifiers.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

_MAX_EXPONENT = 100  # of ten, in an answer that is a number
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# AIME answers are integers, but one mirror of 2025 keeps the degree sign of an angle.
_DEGREES = re.compile(r"\^\s*(\{\s*\\circ\s*\}|\\circ)$|°$")
_BRACES = re.compile(r"\\.|[{}$]", re.DOTALL)


def any_text(value: Any) -> str:
    """The answer, unchanged."""
    text = str(value).strip()
    if not text:
        raise ValueError("is empty")
    return text


def number(value: Any) -> str:
    """A decimal number; a whole number loses its fraction: "27.0" is "27"."""
    text = _THOUSANDS.sub("", any_text(value))
    try:
        parsed = Decimal(text)
    except InvalidOperation:
        parsed = Decimal("nan")
    # No answer has more digits, and "1e999999999" would fill the memory.
    if not parsed.is_finite() or abs(parsed.adjusted()) > _MAX_EXPONENT:
        raise ValueError("is no number")
    whole = parsed == parsed.to_integral_value()
    return str(int(parsed)) if whole else format(parsed.normalize(), "f")


def integer(value: Any) -> str:
    """A whole number, without leading zeros."""
    text = number(value)
    if not text.removeprefix("-").isdigit():
        raise ValueError("is no integer")
    return text


def aime(value: Any) -> str:
    """An integer from 0 to 999."""
    text = integer(_DEGREES.sub("", any_text(value)))
    if not 0 <= int(text) <= 999:
        raise ValueError("is no integer from 0 to 999")
    return text


def gsm8k(value: Any) -> str:
    """The number after the last "####" of a worked solution."""
    _, mark, last = any_text(value).rpartition("####")
    if not mark:
        raise ValueError('has no "####" before its last number')
    return number(last)


def latex(value: Any) -> str:
    """One LaTeX expression or a list of them; a pair of dollars around all of it is removed."""
    parts = value if isinstance(value, list) else [value]
    if not parts:
        raise ValueError("is an empty list")
    return ", ".join(_expression(any_text(part)) for part in parts)


def _expression(text: str) -> str:
    depth = dollars = 0
    for token in _BRACES.findall(text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        dollars += token == "$"
        if depth < 0:
            break
    if depth != 0 or dollars % 2:
        raise ValueError("has unbalanced braces or dollars")
    whole = dollars == 2 and text.startswith("$") and text.endswith("$")
    return any_text(text[1:-1]) if whole else text


KINDS = {"text": any_text, "number": number, "integer": integer, "latex": latex}
"""The kinds that a user can declare for the answers of their own data."""
