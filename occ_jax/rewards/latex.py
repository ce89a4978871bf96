r"""LaTeX as text: finds a completion's final answer and rewrites it unambiguously.

Works on strings alone; leaves parsing and equality to `occ_jax.rewards.symbolic`. It is needed
because of how math-verify reads. It adds digits side by side, and factors side by side, as in a
mixed number (`20\,14`, `{20}{14}` and `20(14)` are 34); symbols that it deletes as decoration join
their neighbours (`3"4` is 34); and among several answers it may take the one that pays.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

# Separators of groups of three digits. The library itself handles a plain comma.
_GROUPS = r"\\,|\\ |~| |\{,\}|,\\!\s*"
_GROUPED, _GROUPED_BY_COMMAS = (
    re.compile(rf"(?<![\w.])[1-9]\d{{0,2}}(?P<by>{by})\d{{3}}(?:(?P=by)\d{{3}})*(?!\d)")
    for by in (_GROUPS, f",|{_GROUPS}")
)

_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$", re.DOTALL
)
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
# The rest of a line, with all lines of a displayed formula that begins on it.
_REST = r"((?:\$\$.+?\$\$|\\\[.+?\\\]|[^\n])+)"
_ANSWER_LINE = re.compile(
    r"^[ \t>#*_]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*:[ \t\r*_]*(?:\n\s*)?(?=\S)" + _REST,
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_SENTENCE = re.compile(
    r"\banswer(?:[ \t]+is|[ \t]*:)[ \t\r:*_]*(?:\n\s*)?(?=\S)" + _REST, re.IGNORECASE | re.DOTALL
)
_GAP = r"[^\S\n]*"
_AND = rf"{_GAP}(?:[,;]|,?{_GAP}(?:\\text\s*\{{{_GAP})?\b(?:and|or)\b{_GAP}\}}?){_GAP}"
_BETWEEN_FORMULAS = re.compile(_AND)
_BETWEEN_BOXES = re.compile(rf"{_GAP}(?:\$|\\\))*(?:{_AND}|{_GAP})(?:\$|\\\()*{_GAP}")
# Beside an answer, these mean that there is another answer, or that this is none.
_DOUBT = re.compile(r"\d|\\|\b(?:or|nor|not)\b|n't", re.IGNORECASE)

_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})")
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)\s*/\s*(\d+)")
_BASED = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?[(]?([+-]?[0-9A-F]+(?:\.[0-9A-F]+)?)[)]?\s*_\s*(\w|\{[^{}]*(?:\{[^{}]*\})?\s*\})"
)
_BOX = re.compile(r"\\(?:boxed|fbox)")
_BOX_COMMAND_CHARACTERS = 16  # \boxed and spaces, before its brace
_SIZES = re.compile(r"\\(?:m?left|m?right|[bB]igg?[lr]?)\s*(?=[()\[\]|]|\\[{}|])")
_SHORTHAND = re.compile(r"\\(?:[dtc]?frac|sqrt)(?![a-zA-Z])")
_ARGUMENT = re.compile(r"\\[a-zA-Z]+|[^\\{}\s]")
_PROPER = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_INTEGERS = re.compile(r"\\frac\{\s*[+-]?\d+\s*\}\{\s*[+-]?\d+\s*\}")

_TEXT = r"\\(?:text\w*|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}"
_TOKEN = re.compile(  # group 1: the content, if it is text
    rf"{_TEXT}|\\(?:begin|end)\s*\{{[^{{}}]*\}}(?:\{{[clr|]*\}})?|\\sqrt\s*\[[^\]]*\]|"
    r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\s+|.",
    re.DOTALL,
)
_NUMERAL = re.compile(r"\.?\d")
_DOUBTFUL_TEXT = re.compile(r"\d|\b(?:or|nor|not)\b.*\w")
# Invisible tokens, and tokens that the library ignores.
_SPACES = {
    *(r"\,", r"\;", r"\:", r"\!", r"\ ", "~", '"', "'", "$", r"\$", r"\quad", r"\qquad"),
    *(r"\thinspace", r"\displaystyle", r"\textstyle", r"\ldots", r"\dots", r"\mathrm{th}"),
}
_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\dbinom": 2, r"\tbinom": 2, "^": 1, "_": 1}


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def final_answer(text: str) -> str | None:
    r"""The LaTeX of the final answer, or None if there is none or it is ambiguous.

    The answer is the first of these that the text has:

    1.  A line that begins with "Answer:" or "Final answer:", after the last \boxed. Markdown's `*`,
        `_`, `#` and `>` around it and a full stop at its end are ignored. The text after the colon,
        or the next line if there is none, is LaTeX, or formulas in LaTeX's delimiters.
    2.  The last \boxed. Boxes on one line with only commas, "and" or "or" between them are one
        list. A box that is not closed is no answer, and boxes before it do not count either.
    3.  The whole text, if it is one formula in LaTeX's delimiters.
    4.  The formulas right after the last "answer is" or "answer:".

    Several formulas with only commas, "and" or "or" between them are a list; otherwise they are
    ambiguous. Words beside a formula are ignored, but digits, commands, "or" and "not" make the
    answer ambiguous.

    Example:
        >>> final_answer("**Answer:** 34.")
        '34'
        >>> final_answer(r"First \boxed{12}; or rather, by the same argument, \boxed{34}")
        '34'
        >>> final_answer(r"\boxed{12} or \boxed{34}")
        '12, 34'
        >>> final_answer("Answer: 12 or $34$")
    """
    box = text.rfind("\\boxed")
    lines = list(_ANSWER_LINE.finditer(text))
    if lines and lines[-1].start() > box:
        return from_formulas(_strip_markdown(lines[-1][1]), plain=True)
    if box >= 0:
        return _from_boxes(text, box)
    if whole := _FORMULA.fullmatch(text.strip()):
        return _formula_content(whole)
    sentences = list(_SENTENCE.finditer(text))
    return from_formulas(_strip_markdown(sentences[-1][1]), plain=False) if sentences else None


def from_formulas(text: str, *, plain: bool) -> str | None:
    """The formulas of a text as one list; without formulas, the text itself if `plain`."""
    formulas = list(_FORMULA.finditer(text))
    if not formulas:
        return text if plain and text and not _DELIMITER.search(text) else None
    for left, right in itertools.pairwise(formulas):
        if not _BETWEEN_FORMULAS.fullmatch(text[left.end() : right.start()]):
            return None
    before, after = text[: formulas[0].start()], text[formulas[-1].end() :]
    percent = re.match(r"\s*\\?%", after)
    if percent:
        after = after[percent.end() :]
    if _DELIMITER.search(before + after) or _DOUBT.search(f"{before} {after}"):
        return None
    return ", ".join(map(_formula_content, formulas)) + (r"\%" if percent else "")


def disambiguate(latex: str) -> str | None:
    r"""Rewrites an answer so that the library reads it as it is meant; None if that is impossible.

    `\frac43`, `\dfrac43` and `\sqrt2` get their braces, 1.6e-19 becomes a power of ten, and digits
    in well-formed groups of three (`1\,234`, `1 000 000`) become one number. Factors side by side
    get a product sign, except in a mixed number: an integer and a proper fraction of integers.
    Other digits side by side are refused, with any invisible text between them, and so are a number
    with a subscript and words with digits or "or" beside a number.

    Example:
        >>> disambiguate(r"1\,234"), disambiguate(r"3\frac12"), disambiguate("2(17)")
        ('1234', '3\\frac{1}{2}', '2\\cdot (17)')
        >>> disambiguate(r"20\,14")
    """
    latex = latex.strip()
    if scientific := _SCIENTIFIC.fullmatch(latex):  # the library reads e as Euler's number
        return rf"{scientific[1]} \times 10^{{{int(scientific[2])}}}"
    latex = _MIXED.sub(r"\1\\frac{\2}{\3}", latex) if _MIXED.fullmatch(latex) else latex
    if "\\begin" not in latex:
        latex = _SIZES.sub("", latex)
    return _add_product_signs(_add_braces(join_digit_groups(latex, commas=False)))


def join_digit_groups(text: str, *, commas: bool) -> str:
    """Joins the digits of numbers that are written in well-formed groups of three."""
    pattern = _GROUPED_BY_COMMAS if commas else _GROUPED
    return pattern.sub(lambda number: "".join(number[0].split(number["by"])), text)


def in_base(latex: str) -> tuple[str, str] | None:
    r"""The digits and the base of a number in a base, as text: ("4343", "6") for `4343_6`."""
    number = _BASED.fullmatch(latex.strip())
    return None if number is None else (number[1], re.sub(r"\\text|[{}()\s]", "", number[2]))


def _formula_content(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _strip_markdown(line: str) -> str:
    """Removes Markdown's emphasis around a line, and one final full stop."""
    line = line.strip(" \t\r\n*_")
    if line.endswith(".") and not line.endswith(".."):
        line = line[:-1].strip(" \t\r\n*_")
    return line


def _from_boxes(text: str, last: int) -> str | None:
    boxes = [box for box in _closed_boxes(text) if box.start <= last]
    if not boxes or boxes[-1].end <= last:
        return None
    contents = [boxes[-1].content]
    for left, right in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _BETWEEN_BOXES.fullmatch(text[left.end : right.start]):
            break
        contents.insert(0, left.content)
    answers = [_unboxed(content) for content in dict.fromkeys(contents)]
    return ", ".join(answers) if all(answers) else None


def _unboxed(content: str) -> str:
    """Removes boxes around the whole content; empty if it holds other boxes."""
    while (boxes := _closed_boxes(content)) and (inner := boxes[0].content):
        if content != f"\\boxed{{{inner}}}":
            break
        content = inner
    return "" if _BOX.search(content) else content


def _closed_boxes(text: str) -> list[_Box]:
    """The outermost boxes that are closed, in order."""
    boxes: list[_Box] = []
    # Start and start of the content of each open box; None for other open braces.
    open_braces: list[tuple[int, int] | None] = []
    index = 0
    while index < len(text):
        if text[index] == "{":
            command_start = max(0, index - _BOX_COMMAND_CHARACTERS)
            box = re.search(r"\\boxed[^\S\n]*$", text[command_start:index])
            open_braces.append((command_start + box.start(), index + 1) if box else None)
        elif text[index] == "}" and open_braces and (box := open_braces.pop()):
            while boxes and boxes[-1].start > box[0]:
                boxes.pop()
            boxes.append(_Box(box[0], index + 1, text[box[1] : index].strip()))
        index += 2 if text[index] == "\\" and text[index + 1 : index + 2] in ("{", "}", "\\") else 1
    return boxes


def _add_braces(latex: str) -> str:
    r"""Adds braces around every argument of \frac and \sqrt; \dfrac and others become \frac."""
    for command in reversed(list(_SHORTHAND.finditer(latex))):
        name = r"\sqrt" if command[0] == r"\sqrt" else r"\frac"
        end, arguments = command.end(), ""
        if option := re.match(r"\s*\[[^\]]*\]", latex[end:]) if name == r"\sqrt" else None:
            name, end = name + option[0].strip(), end + option.end()
        for _ in range(1 if name.startswith(r"\sqrt") else 2):
            argument = _argument(latex, end)
            if argument is None:
                break
            arguments += f"{{{argument[0]}}}"
            end = argument[1]
        else:
            latex = latex[: command.start()] + name + arguments + latex[end:]
    return latex


def _argument(latex: str, start: int) -> tuple[str, int] | None:
    """The argument, a group or one token, that a command takes at `start`, and its end."""
    while latex[start : start + 1].isspace():
        start += 1
    if latex[start : start + 1] == "{":
        depth = 0
        for end in range(start, len(latex)):
            depth += {"{": 1, "}": -1}.get(latex[end], 0)
            if depth == 0:
                return latex[start + 1 : end], end + 1
        return None
    token = _ARGUMENT.match(latex, start)
    if token is None:
        return None
    end = token.end()
    while token[0].startswith("\\") and latex[end : end + 1] == "{":  # \frac{1}\sqrt{2}
        argument = _argument(latex, end)
        if argument is None:
            return None
        end = argument[1]
    return latex[start:end], end


def _add_product_signs(latex: str) -> str | None:
    r"""Adds \cdot between factors side by side; None if they are no product.

    `ended` is the kind of operand that the last token ended: a "number", another "factor" that may
    be an integer for the library, or neither. `missing` counts the arguments that a command still
    takes.
    """
    out: list[str] = []
    # For each open group, missing arguments and `ended` after it; None if it is no argument.
    open_groups: list[tuple[int, str | None]] = []
    ended, after, missing, command = "", "", 0, False
    for match in _TOKEN.finditer(latex):
        token, text = match[0], match[1]
        if token in _SPACES or token.isspace() or (text is not None and not text.strip()):
            out.append(token)
            continue
        argument = missing > 0 or (command and token == "{")
        if token == "{" and not argument:  # these braces are invisible
            open_groups.append((0, None))
            out.append(token)
            continue
        sign = "" if argument or not ended else _product_sign(latex, token, match.start(), ended)
        if sign is None or _BOX.fullmatch(token):
            return None
        out += [sign, token]
        command = token.startswith("\\") and token[1:].isalpha()
        if token == "{":
            open_groups.append((max(0, missing - 1), after))
            ended, missing = "", 0
        elif token == "}":
            if not open_groups:
                return None
            missing, ended_after = open_groups.pop()
            if ended_after is not None:
                ended, after = "" if missing else ended_after, ended_after
        elif token in _ARGUMENTS:
            after = "factor" if ended or token not in "^_" else ""
            ended, missing = "", _ARGUMENTS[token]
        elif missing:
            missing -= 1
            ended = "" if missing else after
        else:
            closes = token in (")", "]", r"\}")
            ended = "number" if _NUMERAL.match(token) else "factor" if closes else ""
            after = ""
    return None if open_groups or _has_words_beside_numbers(latex) else "".join(out)


def _product_sign(latex: str, token: str, start: int, ended: str) -> str | None:
    r"""The sign to add before a token, possibly empty; None if no product is meant."""
    if ended == "number" and (_NUMERAL.match(token) or token in ("[", "_")):
        return None
    if ended == "number" and _INTEGERS.match(latex, start):
        proper = _PROPER.match(latex, start)
        return "" if proper and 0 < int(proper[1]) < int(proper[2]) else None
    opens = _NUMERAL.match(token) or token in ("(", "[", r"\{", r"\frac", r"\binom")
    return r"\cdot " if opens else ""


def _has_words_beside_numbers(latex: str) -> bool:
    r"""Whether the library would delete a second answer like a unit: 34 \text{ or 12}."""
    tokens = list(_TOKEN.finditer(latex))
    doubtful = any(_DOUBTFUL_TEXT.search(token[1] or "") for token in tokens)
    return doubtful and any(_NUMERAL.match(token[0]) for token in tokens)
