"""Mathematical equality by math-verify, in the settings its authors recommend for rewards.

Owns what of a completion is read and how exactly numbers are compared; parsing and equality are the
library's. Imported by the verifier processes alone: it loads SymPy, and hostile formulas (towers of
exponents, factorials, deep nests) make the library hang or fill the memory, so call it through
`occ_jax.rewards.pool`.

Source: math-verify 0.9.0, https://github.com/huggingface/Math-Verify, "What setting I should use".
"""

from __future__ import annotations

import functools
import logging
import math
import re
from fractions import Fraction
from typing import Any

import math_verify as library
from latex2sympy2_extended import NormalizationConfig
from sympy import MatrixBase, Number

from occ_jax.rewards.verifiers import READS, Verdict, shortened

# Every call runs under the pool's deadline. The library's own is a signal, which does not stop all
# that hangs, and it warns when it is switched off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_STRICT = NormalizationConfig(
    basic_latex=True,
    units=True,
    malformed_operators=False,
    nits=False,
    boxed="all",
    equations=False,
)
# An answer stands in a box or after "answer is" or "answer:", in LaTeX. Plain numbers and formulas
# in passing are no answers: with those, "I think 12 then 34" would answer 34.
_ANCHORED = library.LatexExtractionConfig(
    boxed_match_priority=0, normalization_config=_STRICT, try_extract_without_anchor=False
)
_ANYWHERE = library.LatexExtractionConfig(boxed_match_priority=0, normalization_config=_STRICT)
# Publishers write \frac43 and \sqrt2.
_LENIENT = library.LatexExtractionConfig(boxed_match_priority=0)

_FORMULA = re.compile(
    r"\$[^$]+\$|\$\$[^$]+\$\$|\\\((?:(?!\\[()]).)+\\\)|\\\[(?:(?!\\[\[\]]).)+\\\]"
)
_ANSWER_LINE = re.compile(r"^[ \t]*answer[ \t]*:[ \t]*(\S[^\n]*)$", re.IGNORECASE | re.MULTILINE)
_LATEX = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)")


def math_verify(completion: str, answer: str) -> Verdict:
    r"""Right where the completion's final answer equals the answer as mathematics.

    The final answer is the last \boxed{...} among the final 2,000 characters, or what follows on a
    later line that begins with "Answer:", or else LaTeX after "answer is" or "answer:". A
    completion that is nothing but one formula in LaTeX's delimiters answers it. An answer that does
    not parse is wrong, whatever stands before it.

    Both sides are compared by the library with the answer as gold. Its tolerances are absolute (6
    decimals, 15 digits), under which all small numbers are equal; where the answer is smaller than
    a thousandth they are scaled to it.

    Example:
        >>> math_verify(r"So it is \boxed{\frac{1}{2}}.", "0.5").score
        1.0
        >>> math_verify("I think 12 then 34", "34")
        Verdict(score=0.0, given=None)
        >>> math_verify(r"\boxed{5 \times 10^{-19}}", "1.6e-19").score
        0.0
    """
    found = _parse(*_final_answer(completion[-READS["math_verify"] :]))
    if not found:
        return Verdict(0.0, None)
    gold, places, digits = _gold(answer)
    equal = library.verify(
        gold, found, float_rounding=places, numeric_precision=digits, timeout_seconds=0
    )
    return Verdict(float(equal), shortened(_canonical(found)))


def _final_answer(text: str) -> tuple[str, library.LatexExtractionConfig]:
    """What the library shall read, and where in it an answer may stand."""
    box = text.rfind("\\boxed")
    lines = list(_ANSWER_LINE.finditer(text))
    if lines and lines[-1].start() > box:
        answer = lines[-1][1].rstrip()
        return f"Answer: {answer}" if _LATEX.search(answer) else f"\\boxed{{{answer}}}", _ANCHORED
    if box >= 0 and text[box:].count("{") > text[box:].count("}"):
        return "", _ANCHORED  # the library would take the box before the one that does not close
    return text, _ANYWHERE if _FORMULA.fullmatch(text.strip()) else _ANCHORED


def _parse(text: str, extraction: library.LatexExtractionConfig) -> list[Any]:
    """The parsed expression and its LaTeX; the LaTeX alone where it is no expression; or nothing.

    The first match only: the library would go on to earlier answers where the last does not parse.
    """
    return library.parse(text, [extraction], extraction_mode="first_match", parsing_timeout=0)


@functools.lru_cache(maxsize=256)
def _gold(answer: str) -> tuple[list[Any], int, int]:
    """The parsed answer, and the decimals and digits that comparisons with it need."""
    scientific = _SCIENTIFIC.fullmatch(answer.strip())
    if scientific:  # read as LaTeX, 1.6e-19 is 1.6 times Euler's number, minus 19
        answer = rf"{scientific[1]} \times 10^{{{int(scientific[2])}}}"
    text = answer if _LATEX.search(answer) else rf"\boxed{{{answer}}}"
    gold = _parse(text, _LENIENT)
    zeros = max(0, -math.floor(math.log10(_smallest(gold[:1]))))
    return gold, max(6, zeros + 2), max(15, zeros + 12)


def _smallest(gold: list[Any]) -> float:
    """The smallest magnitude but 0 among the numbers a gold answer is or lists; at most 1."""
    smallest = 1.0
    for expression in gold:
        if isinstance(expression, str):
            continue
        if isinstance(expression, MatrixBase):
            parts = expression.flat()
        else:
            parts = [expression] if getattr(expression, "is_number", False) else expression.args
        for part in parts:
            if getattr(part, "is_number", False):
                try:
                    magnitude = abs(complex(part.evalf()))
                except (TypeError, ValueError, OverflowError):
                    continue
                if magnitude > 0:
                    smallest = min(smallest, magnitude)
    return smallest


def _canonical(found: list[Any]) -> str:
    """A name for the given answer, equal for 34, 34.0 and 034, 0.5 and 1/2.

    Other expressions go by their LaTeX without spaces: printing one would evaluate it.
    """
    expression, latex = found[0], found[-1]
    if isinstance(expression, Number) and expression.is_finite:
        try:
            return str(Fraction(str(expression)))
        except ValueError:
            pass
    return "".join(str(latex).split())
