# pyright: strict
r"""LaTeX as text: where a completion's final answer stands, and how it is written unambiguously.

Decides what is read, on strings alone; parsing and equality are `occ_jax.rewards.symbolic`'s. Both
exist because of how math-verify reads: digits side by side, and factors side by side, are added up
as a mixed number is (`20\,14`, `{20}{14}` and `20(14)` are 34), what it drops as decoration joins
its neighbours (`3"4` is 34), and of several answers it may take the one that pays.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

# Between groups of three digits. A plain comma is read as such by the library itself.
_GROUPS = r"\\,|\\ |~| |\{,\}|,\\!\s*"
_GROUPED = re.compile(rf"(?<![\w.])[1-9]\d{{0,2}}(?P<by>{_GROUPS})\d{{3}}(?:(?P=by)\d{{3}})*(?!\d)")
_GROUPED_BY_COMMAS = re.compile(
    rf"(?<![\w.])[1-9]\d{{0,2}}(?P<by>,|{_GROUPS})\d{{3}}(?:(?P=by)\d{{3}})*(?!\d)"
)

_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$((?:\\\$|[^$\n])+?)(?<!\\)\$", re.DOTALL
)
_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
# A line, and the lines that a displayed formula on it goes on for.
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
# Beside an answer these say that there is another, or that it is none.
_DOUBT = re.compile(r"\d|\\|\b(?:or|nor|not)\b|n't", re.IGNORECASE)

_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})")
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)\s*/\s*(\d+)")
_BASED = re.compile(
    r"(?:[a-zA-Z]\s*=\s*)?[(]?([+-]?[0-9A-F]+(?:\.[0-9A-F]+)?)[)]?\s*_\s*(\w|\{[^{}]*(?:\{[^{}]*\})?\s*\})"
)
_BOX = re.compile(r"\\(?:boxed|fbox)")
_SIZES = re.compile(r"\\(?:m?left|m?right|[bB]igg?[lr]?)\s*(?=[()\[\]|]|\\[{}|])")
_SHORTHAND = re.compile(r"\\(?:[dtc]?frac|sqrt)(?![a-zA-Z])")
_ARGUMENT = re.compile(r"\\[a-zA-Z]+|[^\\{}\s]")
_PROPER = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}")
_INTEGERS = re.compile(r"\\frac\{\s*[+-]?\d+\s*\}\{\s*[+-]?\d+\s*\}")

_TEXT = r"\\(?:text\w*|mbox|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{([^{}]*)\}"
_TOKEN = re.compile(
    rf"{_TEXT}|\\(?:begin|end)\s*\{{[^{{}}]*\}}(?:\{{[clr|]*\}})?|\\sqrt\s*\[[^\]]*\]|"
    r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\s+|.",
    re.DOTALL,
)
_NUMERAL = re.compile(r"\.?\d")
_DOUBTFUL_TEXT = re.compile(r"\d|\b(?:or|nor|not)\b.*\w")
# What leaves no trace, or none in the library's reading.
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
    r"""The LaTeX of the final answer, or None where there is none or it is undecided.

    The first of these that there is:

    1.  A line that begins with "Answer:" or "Final answer:", after the last \boxed. It may stand in
        Markdown's `*`, `_`, `#` and `>` and end in a full stop; what follows the colon, on the
        next line if nothing does there, is LaTeX, or formulas in LaTeX's delimiters.
    2.  The last \boxed. Boxes on one line with nothing between them but commas, "and" or "or" are
        one list. A box that is not closed is no answer, and takes the place of those before it.
    3.  The whole, where it is one formula in LaTeX's delimiters.
    4.  The formulas right after the last "answer is" or "answer:".

    Several formulas are a list where nothing but commas, "and" or "or" stands between them, and
    undecided otherwise. Words beside a formula are passed over, but not digits, commands, "or" and
    "not".

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
        return from_formulas(_bare(lines[-1][1]), plain=True)
    if box >= 0:
        return _from_boxes(text, box)
    if whole := _FORMULA.fullmatch(text.strip()):
        return _inside(whole)
    sentences = list(_SENTENCE.finditer(text))
    return from_formulas(_bare(sentences[-1][1]), plain=False) if sentences else None


def from_formulas(text: str, *, plain: bool) -> str | None:
    """The formulas of a text as one list; the text itself, if `plain`, where there are none."""
    found = list(_FORMULA.finditer(text))
    if not found:
        return text if plain and text and not _DELIMITER.search(text) else None
    for left, right in itertools.pairwise(found):
        if not _BETWEEN_FORMULAS.fullmatch(text[left.end() : right.start()]):
            return None
    before, after = text[: found[0].start()], text[found[-1].end() :]
    percent = re.match(r"\s*\\?%", after)
    if percent:
        after = after[percent.end() :]
    if _DELIMITER.search(before + after) or _DOUBT.search(f"{before} {after}"):
        return None
    return ", ".join(map(_inside, found)) + (r"\%" if percent else "")


def readable(latex: str) -> str | None:
    r"""An answer as the library shall read it; None where its reading would be another.

    `\frac43`, `\dfrac43` and `\sqrt2` get their braces, 1.6e-19 its power of ten, and digits in
    well-formed groups of three (`1\,234`, `1 000 000`) are one number. Factors side by side get
    their sign, but for a mixed number, an integer and a proper fraction of integers. Other digits
    side by side are refused, whatever invisible stands between them, and so are a number with a
    subscript and words with digits or "or" beside a number.

    Example:
        >>> readable(r"1\,234"), readable(r"3\frac12"), readable("2(17)")
        ('1234', '3\\frac{1}{2}', '2\\cdot (17)')
        >>> readable(r"20\,14")
    """
    latex = latex.strip()
    if scientific := _SCIENTIFIC.fullmatch(latex):  # the library knows an e, Euler's number
        return rf"{scientific[1]} \times 10^{{{int(scientific[2])}}}"
    latex = _MIXED.sub(r"\1\\frac{\2}{\3}", latex) if _MIXED.fullmatch(latex) else latex
    if "\\begin" not in latex:
        latex = _SIZES.sub("", latex)
    return _explicit(_braced(join_digit_groups(latex, commas=False)))


def join_digit_groups(text: str, *, commas: bool) -> str:
    """The text with the groups of well-formed grouped numbers joined."""
    pattern = _GROUPED_BY_COMMAS if commas else _GROUPED
    return pattern.sub(lambda found: "".join(found[0].split(found["by"])), text)


def in_base(latex: str) -> tuple[str, str] | None:
    r"""The digits and the base of a number in a base, as text: ("4343", "6") of `4343_6`."""
    found = _BASED.fullmatch(latex.strip())
    return None if found is None else (found[1], re.sub(r"\\text|[{}()\s]", "", found[2]))


def _inside(formula: re.Match[str]) -> str:
    return next(group for group in formula.groups() if group is not None).strip()


def _bare(line: str) -> str:
    """Without Markdown's emphasis around it and one final full stop."""
    line = line.strip(" \t\r\n*_")
    if line.endswith(".") and not line.endswith(".."):
        line = line[:-1].strip(" \t\r\n*_")
    return line


def _from_boxes(text: str, last: int) -> str | None:
    boxes = [found for found in _closed_boxes(text) if found.start <= last]
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
    """Without boxes around the whole of it; empty where there are others in it."""
    while (inner := _closed_boxes(content)) and inner[0].content and content == _text_of(inner[0]):
        content = inner[0].content
    return "" if _BOX.search(content) else content


def _text_of(box: _Box) -> str:
    return f"\\boxed{{{box.content}}}"


def _closed_boxes(text: str) -> list[_Box]:
    """The outermost boxes that are closed, in order."""
    found: list[_Box] = []
    opened: list[tuple[int, int] | None] = []  # start and content of a box; None for other braces
    place = 0
    while place < len(text):
        if text[place] == "{":
            box = re.search(r"\\boxed[^\S\n]*$", text[max(0, place - 16) : place])
            start = max(0, place - 16) + box.start() if box else 0
            opened.append((start, place + 1) if box else None)
        elif text[place] == "}" and opened and (box := opened.pop()):
            while found and found[-1].start > box[0]:
                found.pop()
            found.append(_Box(box[0], place + 1, text[box[1] : place].strip()))
        place += 2 if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}", "\\") else 1
    return found


def _braced(latex: str) -> str:
    r"""With braces around every argument of \frac and \sqrt, and \frac for its other sizes."""
    for found in reversed(list(_SHORTHAND.finditer(latex))):
        name = r"\sqrt" if found[0] == r"\sqrt" else r"\frac"
        end, arguments = found.end(), ""
        if option := re.match(r"\s*\[[^\]]*\]", latex[end:]) if name == r"\sqrt" else None:
            name, end = name + option[0].strip(), end + option.end()
        for _ in range(1 if name.startswith(r"\sqrt") else 2):
            argument = _argument(latex, end)
            if argument is None:
                break
            arguments += f"{{{argument[0]}}}"
            end = argument[1]
        else:
            latex = latex[: found.start()] + name + arguments + latex[end:]
    return latex


def _argument(latex: str, place: int) -> tuple[str, int] | None:
    """What a command takes there, a group or one token, and where it ends."""
    while latex[place : place + 1].isspace():
        place += 1
    if latex[place : place + 1] == "{":
        depth = 0
        for end in range(place, len(latex)):
            depth += {"{": 1, "}": -1}.get(latex[end], 0)
            if depth == 0:
                return latex[place + 1 : end], end + 1
        return None
    token = _ARGUMENT.match(latex, place)
    if token is None:
        return None
    end = token.end()
    while token[0].startswith("\\") and latex[end : end + 1] == "{":  # \frac{1}\sqrt{2}
        argument = _argument(latex, end)
        if argument is None:
            return None
        end = argument[1]
    return latex[place:end], end


def _explicit(latex: str) -> str | None:
    r"""With \cdot between factors side by side; None where they are no product.

    `ended` says what the last token closed: a "number", another "factor" that may be an integer for
    the library, or neither. `wanted` counts the arguments that a command still takes.
    """
    out: list[str] = []
    # Of each, arguments wanted and `ended` after it; None of braces that are no argument.
    open_groups: list[tuple[int, str | None]] = []
    ended, after, wanted, command = "", "", 0, False
    for token, text, place in _tokens(latex):
        if token in _SPACES or token.isspace() or (text is not None and not text.strip()):
            out.append(token)
            continue
        argument = wanted > 0 or (command and token == "{")
        if token == "{" and not argument:  # nothing is seen of these braces
            open_groups.append((0, None))
            out.append(token)
            continue
        sign = "" if argument or not ended else _sign(latex, token, place, ended)
        if sign is None or _BOX.fullmatch(token):
            return None
        out += [sign, token]
        command = token.startswith("\\") and token[1:].isalpha()
        if token == "{":
            open_groups.append((max(0, wanted - 1), after))
            ended, wanted = "", 0
        elif token == "}":
            if not open_groups:
                return None
            wanted, then = open_groups.pop()
            if then is not None:
                ended, after = "" if wanted else then, then
        elif token in _ARGUMENTS:
            after = "factor" if ended or token not in "^_" else ""
            ended, wanted = "", _ARGUMENTS[token]
        elif wanted:
            wanted -= 1
            ended = "" if wanted else after
        else:
            closes = token in (")", "]", r"\}")
            ended = "number" if _NUMERAL.match(token) else "factor" if closes else ""
            after = ""
    return None if open_groups or _has_words_beside_numbers(latex) else "".join(out)


def _sign(latex: str, token: str, place: int, ended: str) -> str | None:
    r"""The sign that is left out before a token; None where no product is meant."""
    if ended == "number" and (_NUMERAL.match(token) or token in ("[", "_")):
        return None
    if ended == "number" and _INTEGERS.match(latex, place):
        return "" if _is_proper(latex, place) else None
    opens = _NUMERAL.match(token) or token in ("(", "[", r"\{", r"\frac", r"\binom")
    return r"\cdot " if opens else ""


def _has_words_beside_numbers(latex: str) -> bool:
    r"""Whether the library would drop a second answer as if it were a unit: 34 \text{ or 12}."""
    tokens = list(_tokens(latex))
    doubtful = any(text is not None and _DOUBTFUL_TEXT.search(text) for _, text, _ in tokens)
    return doubtful and any(_NUMERAL.match(token) for token, _, _ in tokens)


def _tokens(latex: str) -> Iterator[tuple[str, str | None, int]]:
    """Tokens, the text of those that are text, and where they begin."""
    for found in _TOKEN.finditer(latex):
        yield found[0], found[1], found.start()


def _is_proper(latex: str, place: int) -> bool:
    fraction = _PROPER.match(latex, place)
    return fraction is not None and 0 < int(fraction[1]) < int(fraction[2])
