"""Mathematical equality by math-verify, in the settings its authors recommend for rewards.

Owns how exactly numbers are compared; what of a completion is read is `occ_jax.rewards.latex`'s,
parsing and equality are the library's. Imported by the verifier processes alone: it loads SymPy,
and hostile formulas (towers of exponents, factorials, deep nests) make the library hang or fill the
memory, so call it through `occ_jax.rewards.pool`.

Source: math-verify 0.9.0, https://github.com/huggingface/Math-Verify, "What setting I should use".
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

from occ_jax.rewards.latex import final_answer, from_formulas, in_base, readable
from occ_jax.rewards.verifiers import CHARACTERS_READ, Verdict, shortened

# Every call runs under the pool's deadline. The library's own is a signal, which does not stop all
# that hangs, and it warns when it is switched off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# The answer is found and made unambiguous before the library sees it, so it reads a box; the right
# answer is read in the same way, or one that repeats it would not always equal it.
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


def math_verify(completion: str, answer: str) -> Verdict:
    r"""Right where the completion's final answer equals the answer as mathematics.

    The final answer is what `occ_jax.rewards.latex.final_answer` finds among the final 2,000
    characters: a last line "Answer: ...", the last \boxed{...}, or formulas after "answer is". An
    answer that does not parse is wrong, whatever stands before it. A number in a base (`4343_6`) is
    right where its digits and base are the answer's.

    Both sides are compared by the library with the answer as gold. Its tolerances are absolute (6
    decimals, 15 digits), under which all small numbers are equal; where the answer is smaller than
    a thousandth they are scaled to it.

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
    found, gold = _parse(given), _gold(right)
    if given == right:
        return Verdict(1.0, shortened(_canonical(found or [given])))
    if not found or not gold.parsed:
        return Verdict(0.0, shortened(_canonical(found)) if found else None)
    equal = library.verify(
        gold.parsed,
        found,
        float_rounding=gold.places,
        numeric_precision=gold.digits,
        timeout_seconds=0,
    )
    return Verdict(float(equal), shortened(_canonical(found)))


class _Gold(NamedTuple):
    """A right answer, and the decimals and digits that comparisons with it need."""

    parsed: list[Any]
    places: int
    digits: int


def _parse(answer: str) -> list[Any]:
    """The parsed expression and its LaTeX; the LaTeX alone where it is no expression; or nothing.

    The first match only: the library would go on to earlier answers where the last does not parse.
    """
    latex = readable(answer)
    if latex is None:
        return []
    return library.parse(
        f"\\boxed{{{latex}}}", [_BOXED], extraction_mode="first_match", parsing_timeout=0
    )


@functools.lru_cache(maxsize=256)
def _gold(answer: str) -> _Gold:
    parsed = _parse(answer)
    zeros = max(0, -math.floor(math.log10(_smallest(parsed[:1]))))
    return _Gold(parsed, max(6, zeros + 2), max(15, zeros + 12))


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
