# pyright: strict
"""Rules that judge a completion by its text: what is read, what is normalised, what is equal.

Every verifier is a pure function `(completion, answer) -> Verdict` on strings, without JAX and
without state. They are fast but for `math_verify` (`occ_jax.rewards.symbolic`), which may also hang
on hostile text; `occ_jax.rewards.pool` runs all of them where that harms nobody.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from occ_jax.rewards.latex import joined

_LONGEST_GIVEN = 256  # characters of an answer that is kept as it is

# The characters at the end of a completion that are read; whole ones by the others. The rule of
# DAPO says 300. math-verify needs up to quadratic time, and no answer of MATH-500 exceeds 159.
READS = {"math_dapo": 300, "math_verify": 2000}

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# Replaced in this order, before what is dropped.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", "")),
    *(("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_DROPPED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples"),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}"),
    *("\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = (
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # what stands between the first two dollars
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


# Of a line that gives one answer.
_DOLLAR = re.compile(r"(?<!\\)\$")
_BEFORE_DOLLARS = re.compile(r"\s*(?:\\?[A-Za-z](?:[A-Za-z_(){}+*\-\s]*[^\s])?\s*=\s*)?")
_AFTER_DOLLARS = re.compile(r"[\s.]*")
_LIST = re.compile(r"[,;]|\b(?:or|and)\b")
_DIGITS = re.compile(r"\d+")


class Verdict(NamedTuple):
    """What a verifier says about one completion."""

    score: float
    """1 for a right completion, 0 for a wrong one; functions of users may say other numbers."""
    given: str | None
    """The answer the completion gives, normalised, which majorities are counted over."""


def exact_match(completion: str, answer: str) -> Verdict:
    """Right where the completion is the answer, character by character.

    Example:
        >>> exact_match("951413", "951413")
        Verdict(score=1.0, given='951413')
        >>> exact_match("It is 951413", "951413").score
        0.0
    """
    return Verdict(float(completion == answer), shortened(completion))


def last_step(completion: str, answer: str) -> Verdict:
    """As `exact_match`, of what follows the last ">": intermediate steps are free.

    Example:
        >>> last_step("13>22>28", "28")
        Verdict(score=1.0, given='28')
    """
    return exact_match(completion.rpartition(">")[2], answer)


def math_dapo(completion: str, answer: str) -> Verdict:
    r"""The rule DAPO trains with: the last "Answer: ..." among the final 300 characters.

    What follows the colon on its line, and the answer, are normalised (the part after the last
    "=", without units, dollars, spaces, \text and \boxed) and compared as strings. So `34`, `$34$`,
    `\boxed{34}` and `x=34` answer 34; `34.`, `34.0`, `034` and `**Answer:** 34` do not.

    One departure: the published rule keeps what stands between the first two dollars or after the
    last "=" of a line that gives several answers, and drops what stands between digits. Here such a
    line is wrong: one with more than a pair of dollars, or anything but `x=`, units and a full stop
    beside them; one with a list before its last "="; and one whose digits were apart, unless in
    well-formed groups of three.

    Example:
        >>> math_dapo("The sum is 34.\nAnswer: $x=34$", "34")
        Verdict(score=1.0, given='34')
        >>> math_dapo("The sum is 34.", "34")
        Verdict(score=0.0, given=None)
        >>> math_dapo("Answer: 12 or $34$", "34")  # 1.0 as published
        Verdict(score=0.0, given=None)

    Source: DAPO, arXiv 2503.14476; the normalisation is Minerva's, arXiv 2206.14858, appendix D.1.
    """
    found = _ANSWER_LINE.findall(completion[-READS["math_dapo"] :])
    if not found:
        return Verdict(0.0, None)
    given = _normalised(found[-1])
    if not _is_one_answer(found[-1], given, answer):
        return Verdict(0.0, None)
    return Verdict(float(given == _normalised(answer)), shortened(given))


def _is_one_answer(line: str, given: str, answer: str) -> bool:
    """Whether the line gives one answer, of which `given` is the normalised form."""
    parts = _DOLLAR.split(line)
    if len(parts) > 3:
        return False
    if len(parts) == 3:
        after = parts[2]
        for word in _DROPPED:
            after = after.replace(word, "")
        if not (_BEFORE_DOLLARS.fullmatch(parts[0]) and _AFTER_DOLLARS.fullmatch(after)):
            return False
    if _LIST.search(line.rpartition("=")[0]):
        return False
    runs = _DIGITS.findall(joined(line, commas=True))
    if runs == _DIGITS.findall(joined(answer, commas=True)):
        return True
    return all(any(run in whole for whole in runs) for run in _DIGITS.findall(given))


def _normalised(text: str) -> str:
    text = text.rpartition("=")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for word in _DROPPED:
        text = text.replace(word, "")
    for pattern, form in _REWRITTEN:
        text = pattern.sub(form, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()


def shortened(given: str) -> str:
    """A given answer as it is kept: one of many characters as its beginning and a digest."""
    if len(given) <= _LONGEST_GIVEN:
        return given
    digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{given[:_LONGEST_GIVEN]}… {digest}"
