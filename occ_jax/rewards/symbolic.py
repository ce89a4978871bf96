"""Mathematical equality by math-verify, in the settings its authors recommend for rewards.

Owns the tolerances of comparisons. Leaves finding the answer in a completion to
`occ_jax.rewards.latex`, and parsing and equality to the library. Only the verifier processes import
it: it loads SymPy, and hostile formulas (towers of exponents, factorials, deep nests) make the
library hang or fill the memory, so call it through `occ_jax.rewards.pool`.

Source:
    math-verify 0.9.0, https://github.com/huggingface/Math-Verify, "What setting I should use".
"""

from __future__ import annotations

import functools
import logging
import math
from fractions import Fraction
from typing import Any, NamedTuple

import math_verify as library
from latex2sympy2_extended import NormalizationConfig
from sympy import MatrixBase, Number

from occ_jax.rewards.latex import disambiguate, final_answer, from_formulas, in_base
from occ_jax.rewards.verifiers import CHARACTERS_READ, Verdict, shortened

# Every call runs under the pool's deadline. The library's own deadline is a signal, which does not
# stop everything that hangs, and the library warns when it is switched off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# The library reads a box, as the answer is extracted and made unambiguous before. The right answer
# is read in the same way, or a completion that repeats it would not always equal it.
_BOXED = library.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True,
        units=True,
        malformed_operators=False,
        nits=False,
        boxed="all",
        equations=False,
    ),
)

_LIBRARY_PLACES, _LIBRARY_DIGITS = 6, 15  # decimals and digits that the library compares
_EXTRA_PLACES, _EXTRA_DIGITS = 2, 12  # for a small answer, beyond the zeros after its point


def math_verify(completion: str, answer: str) -> Verdict:
    r"""Right if the completion's final answer equals the answer mathematically.

    `occ_jax.rewards.latex.final_answer` finds the final answer among the final 2,000 characters: a
    last line "Answer: ...", the last \boxed{...}, or formulas after "answer is". An answer that
    does not parse is wrong; earlier answers are not tried. A number in a base (`4343_6`) is right
    if its digits and base are those of the answer.

    The library compares both sides with the answer as gold. Its tolerances are absolute (6
    decimals, 15 digits), so it takes all small numbers as equal; for an answer below a thousandth
    the tolerances are scaled to it.

    Example:
        >>> math_verify(r"So it is \boxed{\frac{1}{2}}.", "0.5").score
        1.0
        >>> math_verify("I think 12 then 34", "34")
        Verdict(score=0.0, given=None)
        >>> math_verify(r"\boxed{20\,14}", "34").score  # 1.0 by the library: it adds the two
        0.0
    """
    given = final_answer(completion[-CHARACTERS_READ["math_verify"] :])
    if not given:
        return Verdict(0.0, None)
    right = from_formulas(answer.strip(), plain=True) or answer
    if in_base(given) or in_base(right):
        name = "_".join(in_base(given) or (given,))
        return Verdict(float(in_base(given) == in_base(right)), shortened(name))
    parsed, gold = _parse(given), _gold(right)
    if given == right:
        return Verdict(1.0, shortened(_canonical(parsed or [given])))
    if not parsed or not gold.parsed:
        return Verdict(0.0, shortened(_canonical(parsed)) if parsed else None)
    equal = library.verify(
        gold.parsed,
        parsed,
        float_rounding=gold.places,
        numeric_precision=gold.digits,
        timeout_seconds=0,
    )
    return Verdict(float(equal), shortened(_canonical(parsed)))


class _Gold(NamedTuple):
    """A right answer, and the decimals and digits with which it is compared."""

    parsed: list[Any]
    places: int
    digits: int


def _parse(answer: str) -> list[Any]:
    """The parsed expression and its LaTeX; the LaTeX alone if it is no expression; or nothing.

    Only the first match: the library would continue with earlier answers if the last does not
    parse.
    """
    latex = disambiguate(answer)
    if latex is None:
        return []
    return library.parse(
        f"\\boxed{{{latex}}}", [_BOXED], extraction_mode="first_match", parsing_timeout=0
    )


@functools.lru_cache(maxsize=256)
def _gold(answer: str) -> _Gold:
    parsed = _parse(answer)
    smallest = _smallest(parsed[0]) if parsed else 1.0
    zeros = max(0, -math.floor(math.log10(smallest)))
    places = max(_LIBRARY_PLACES, zeros + _EXTRA_PLACES)
    return _Gold(parsed, places, max(_LIBRARY_DIGITS, zeros + _EXTRA_DIGITS))


def _smallest(gold: Any) -> float:
    """The smallest magnitude above 0 of the numbers in a gold answer; at most 1."""
    smallest = 1.0
    if isinstance(gold, MatrixBase):
        parts = gold.flat()
    else:
        parts = [gold] if getattr(gold, "is_number", False) else getattr(gold, "args", ())
    for part in parts:
        if getattr(part, "is_number", False):
            try:
                magnitude = abs(complex(part.evalf()))
            except (TypeError, ValueError, OverflowError):
                continue
            if magnitude > 0:
                smallest = min(smallest, magnitude)
    return smallest


def _canonical(parsed: list[Any]) -> str:
    """The given answer's canonical form, the same for 34, 34.0 and 034, and for 0.5 and 1/2.

    For other expressions it is their LaTeX without spaces, as printing one would evaluate it.
    """
    expression, latex = parsed[0], parsed[-1]
    if isinstance(expression, Number) and expression.is_finite:
        try:
            return str(Fraction(str(expression)))
        except ValueError:
            pass
    return "".join(str(latex).split())
