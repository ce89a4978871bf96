"""Verifiers that compare text: the part they read, its normalisation, and equality.

Every verifier is a pure function `(completion, answer) -> Verdict` on strings, without JAX and
without state. Leaves equality of formulas to `occ_jax.rewards.symbolic`, and isolation to
`occ_jax.rewards.pool`, which runs all verifiers in processes that may hang or crash.
"""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from occ_jax.rewards.latex import join_digit_groups

_LONGEST_GIVEN = 256  # characters; a longer answer is shortened

# Characters at the end of a completion that a verifier reads; the others read all of it. DAPO's
# rule says 300. math-verify takes up to quadratic time, and no answer of MATH-500 exceeds 159.
CHARACTERS_READ = {"math_dapo": 300, "math_dapo_strict": 300, "math_verify": 2000}

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# Replaced in this order, before `_DELETED` are deleted.
_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", "")),
    *(("mbox", "text"), (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")),
)
_DELETED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots"),
    *("sue", "points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds"),
    *("meters", "meals", "edges", "students", "childrentickets", "multiples"),
    *("\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}"),
    *("\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
_REWRITTEN = (
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),  # the text between the first two dollars
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)

# `math_dapo_strict` tells by these whether a line gives one answer.
_DOLLAR = re.compile(r"(?<!\\)\$")
_BEFORE_DOLLARS = re.compile(r"\s*(?:\\?[A-Za-z](?:[A-Za-z_(){}+*\-\s]*[^\s])?\s*=\s*)?")
_AFTER_DOLLARS = re.compile(r"[\s.]*")
_LIST = re.compile(r"[,;]|\b(?:or|and)\b")
_DIGITS = re.compile(r"\d+")


class Verdict(NamedTuple):
    """The result of a verifier for one completion."""

    score: float  # 1 if right, 0 if wrong; a user's function may return other numbers
    given: str | None  # the normalised answer of the completion; maj@k counts votes by it


def exact_match(completion: str, answer: str) -> Verdict:
    """Right if the completion equals the answer, character by character.

    Example:
        >>> exact_match("951413", "951413")
        Verdict(score=1.0, given='951413')
        >>> exact_match("It is 951413", "951413").score
        0.0
    """
    return Verdict(float(completion == answer), shortened(completion))


def last_step(completion: str, answer: str) -> Verdict:
    """`exact_match` on the text after the last ">": intermediate steps are free.

    Example:
        >>> last_step("13>22>28", "28")
        Verdict(score=1.0, given='28')
    """
    return exact_match(completion.rpartition(">")[2], answer)


def math_dapo(completion: str, answer: str) -> Verdict:
    r"""DAPO's rule as published: the last "Answer: ..." among the final 300 characters.

    The text after the colon, up to the end of its line, and the answer are normalised (the part
    after the last "=", without units, dollars, spaces, \text and \boxed) and compared as strings.
    So `34`, `$34$`, `\boxed{34}` and `x=34` answer 34; `34.`, `34.0`, `034` and `**Answer:** 34` do
    not.

    The normalisation keeps the text between the first two dollars or after the last "=", and
    deletes spaces and units between digits. So the rule also pays for some lines that give several
    answers, or none; a policy can learn to write them. `math_dapo_strict` does not pay for them.

    Example:
        >>> math_dapo("The sum is 34.\nAnswer: $x=34$", "34")
        Verdict(score=1.0, given='34')
        >>> math_dapo("The sum is 34.", "34")
        Verdict(score=0.0, given=None)
        >>> math_dapo("Answer: $34$ or $12$", "34").score, math_dapo("Answer: 3 4", "34").score
        (1.0, 1.0)

    Source:
        DAPO, arXiv 2503.14476, and its release in verl, `math_dapo.py`; the normalisation is
        Minerva's, arXiv 2206.14858, appendix D.1.
    """
    line = _last_answer_line(completion)
    if line is None:
        return Verdict(0.0, None)
    given = _normalised(line)
    return Verdict(float(given == _normalised(answer)), shortened(given))


def math_dapo_strict(completion: str, answer: str) -> Verdict:
    r"""`math_dapo`, but wrong if the line does not give exactly one answer.

    These lines are wrong: a line with more than one pair of dollars, or with anything but `x=`,
    units and a full stop beside the pair; a line with a list before its last "="; and a line whose
    digits become one number only when the text between them is deleted, unless they stand in
    well-formed groups of three.

    Example:
        >>> math_dapo_strict("The sum is 34.\nAnswer: $x=34$", "34")
        Verdict(score=1.0, given='34')
        >>> math_dapo_strict("Answer: 12 or $34$", "34")
        Verdict(score=0.0, given=None)
    """
    line = _last_answer_line(completion)
    if line is None or not _is_one_answer(line, answer):
        return Verdict(0.0, None)
    return math_dapo(completion, answer)


def _last_answer_line(completion: str) -> str | None:
    lines = _ANSWER_LINE.findall(completion[-CHARACTERS_READ["math_dapo"] :])
    return lines[-1] if lines else None


def _is_one_answer(line: str, answer: str) -> bool:
    """Whether the line gives one answer, written as one."""
    parts = _DOLLAR.split(line)
    if len(parts) > 3:
        return False
    if len(parts) == 3:
        after = parts[2]
        for word in _DELETED:
            after = after.replace(word, "")
        if not (_BEFORE_DOLLARS.fullmatch(parts[0]) and _AFTER_DOLLARS.fullmatch(after)):
            return False
    if _LIST.search(line.rpartition("=")[0]):
        return False
    numbers = _DIGITS.findall(join_digit_groups(line, commas=True))
    if numbers == _DIGITS.findall(join_digit_groups(answer, commas=True)):
        return True
    given = _DIGITS.findall(_normalised(line))
    return all(any(number in written for written in numbers) for number in given)


def _normalised(text: str) -> str:
    text = text.rpartition("=")[2]
    for old, new in _REPLACED:
        text = text.replace(old, new)
    for word in _DELETED:
        text = text.replace(word, "")
    for pattern, form in _REWRITTEN:
        text = pattern.sub(form, text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()


def shortened(given: str) -> str:
    """A given answer as records keep it: a long one as its beginning and a digest."""
    if len(given) <= _LONGEST_GIVEN:
        return given
    digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{given[:_LONGEST_GIVEN]}… {digest}"
