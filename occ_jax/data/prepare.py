"""From publishers' files to a prepared set: read, check every row, drop repetitions, write.

Nothing is written before every row of every file has passed, and nothing that is there is ever
overwritten. Reading prepared sets is left to `occ_jax.data.prepared`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from occ_jax.data.chat import Message
from occ_jax.data.examples import Example
from occ_jax.data.prepared import set_directory
from occ_jax.data.published import PUBLISHED, Layout, PublishedSet
from occ_jax.data.rows import Row, column_names, read_rows
from occ_jax.errors import UserError


class Summary(NamedTuple):
    """What became of the rows."""

    rows: int  # read
    problems: int  # kept
    repeated: int  # left out: an earlier row has the same prompt
    contradicted: int  # of those, with another answer than the earlier row
    bad: int  # left out: the answer does not parse


def find_set(
    name: str, own: Layout | None, read_answer: Callable[[Any], str], *, distinct: bool = False
) -> PublishedSet:
    """The published set of a name, or one of a user's own with the columns of `own`.

    Args:
        name: of the prepared set.
        own: the columns of a user's own files; None for a published set.
        read_answer: checks a user's own answers.
        distinct: keep only the first of a user's own rows with equal prompts.

    Raises:
        UserError: the name is of neither, of both, or no name.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
        raise UserError(f"{name!r} is no name for a set: use lower-case letters, digits and _")
    if own is None and name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, cutoff=0.5)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"{name} is no published set ({', '.join(PUBLISHED)}); {meant}Your own data needs "
            "--prompt-column and --answer-column"
        )
    if own is not None and name in PUBLISHED:
        raise UserError(
            f"{name} is a published set with columns of its own; give your data another name"
        )
    return PUBLISHED[name] if own is None else PublishedSet((), read_answer, (own,), distinct)


def prepare(
    name: str,
    found: PublishedSet,
    files: Sequence[Path],
    directory: Path,
    *,
    allow_row_count: bool = False,
    drop_bad_rows: bool = False,
) -> tuple[Path, Summary]:
    """Reads, checks and writes a set.

    Args:
        name: of the set, and of its directory.
        found: from `find_set`.
        files: Parquet or JSON lines, in the order of the set.
        directory: where prepared sets are kept.
        allow_row_count: take a published set with another number of problems.
        drop_bad_rows: leave out rows whose answer does not parse, instead of refusing the file.

    Returns:
        Where the set lies, and what became of the rows.

    Raises:
        UserError: the set is there already, a file cannot be read, or a row is not as it should be.
    """
    target = set_directory(directory, name)
    if target.exists():
        raise UserError(f"{target} is prepared already; delete it to prepare {name} anew")
    examples, summary = _read(name, found, files, drop_bad_rows)
    _check_count(name, found, files, summary, allow_row_count)
    from occ_jax.data.builder import write_set  # imports TFDS

    try:
        write_set(directory, name, examples, [file.name for file in files])
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error
    return target, summary


def _read(
    name: str, found: PublishedSet, files: Sequence[Path], drop_bad_rows: bool
) -> tuple[list[Example], Summary]:
    """All examples of all files, every one checked."""
    examples: dict[str | tuple[Message, ...] | int, Example] = {}
    owners: dict[str, str] = {}
    rows = repeated = contradicted = bad = 0
    for row, layout in _rows(found, name, files):
        rows += 1
        prompt = _prompt(row, layout)
        answer = _answer(row, layout, found.read_answer)
        if isinstance(answer, UserError):
            if not drop_bad_rows:
                raise answer
            bad += 1
            continue
        if found.distinct and prompt in examples:
            repeated += 1
            contradicted += examples[prompt].answer != answer
            continue
        identity = _identity(row, layout, rows)
        if identity in owners:
            raise row.error(f"id {identity} is that of {owners[identity]} too")
        owners[identity] = f"{row.file} row {row.number}"
        key = prompt if found.distinct else rows
        examples[key] = Example(prompt, answer, source=name, id=identity)
    summary = Summary(rows, len(examples), repeated, contradicted, bad)
    return list(examples.values()), summary


def _rows(found: PublishedSet, name: str, files: Sequence[Path]) -> Iterator[tuple[Row, Layout]]:
    """Every row with the layout of its file, all files' columns checked before the first row."""
    layouts = [_layout_of(found, name, file) for file in files]
    for file, (layout, columns) in zip(files, layouts, strict=True):
        for row in read_rows(file, columns):
            yield row, layout


def _layout_of(found: PublishedSet, name: str, file: Path) -> tuple[Layout, list[str]]:
    """The layout whose prompt and answer columns a file has, and the columns to read."""
    there = column_names(file)
    for layout in found.layouts:
        needed, optional = _columns(layout)
        if set(needed) <= set(there):
            return layout, [*needed, *(column for column in optional if column in there)]
    wanted = " or ".join(
        " and ".join(_columns(layout)[0]) + (f" ({layout.publisher})" if layout.publisher else "")
        for layout in found.layouts
    )
    raise UserError(f"{file} has columns {', '.join(there)}; {name} needs {wanted}")


def _columns(layout: Layout) -> tuple[list[str], list[str]]:
    """The columns that must be there, and those that are read where they are."""
    needed, optional = [layout.prompt, layout.answer], [layout.context]
    # An id column that the user named is meant; publishers' mirrors may lack theirs.
    (optional if layout.publisher else needed).append(layout.id)
    return [_column(path) for path in needed if path], [_column(path) for path in optional if path]


def _column(path: str) -> str:
    return path.partition(".")[0]


def _prompt(row: Row, layout: Layout) -> str | tuple[Message, ...]:
    value = row.at(layout.prompt)
    if isinstance(value, str):
        context = row.values.get(layout.context) or ""
        text = f"{context}\n{value}" if str(context).strip() else value
        return _text(row, layout.prompt, text)
    if not isinstance(value, list) or not value:
        raise row.error(f"{layout.prompt} is neither a text nor a list of messages")
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise row.error(f"{layout.prompt} holds a message without role or content")
        turns.append(
            Message(
                _text(row, f"a role in {layout.prompt}", turn["role"]),
                _text(row, f"a content in {layout.prompt}", turn["content"]),
            )
        )
    if turns[-1].role != "user":
        raise row.error(f"{layout.prompt} ends with a turn of {turns[-1].role}, not of user")
    return tuple(turns)


def _answer(row: Row, layout: Layout, read: Callable[[Any], str]) -> str | UserError:
    value = row.at(layout.answer)
    try:
        return _text(row, layout.answer, read(value))
    except ValueError as error:
        return row.error(f"{layout.answer} {str(value)[-60:]!r} {error}")


def _identity(row: Row, layout: Layout, position: int) -> str:
    if layout.id and _column(layout.id) in row.values:
        return _text(row, layout.id, str(row.at(layout.id)))
    return str(position)


def _text(row: Row, what: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise row.error(f"{what} is empty" if value == "" else f"{what} is no text: {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.error(f"{what} is no valid Unicode text") from error
    return value


def _check_count(
    name: str, found: PublishedSet, files: Sequence[Path], summary: Summary, allow: bool
) -> None:
    if summary.problems == 0:
        raise UserError(f"{files[0]}: no row of {summary.rows} has an answer that parses")
    if found.num_problems and summary.problems not in found.num_problems and not allow:
        listed = ", ".join(map(str, files))
        raise UserError(
            f"{listed}: {summary.problems:,} problems in {summary.rows:,} rows; {name} has "
            f"{' or '.join(f'{n:,}' for n in found.num_problems)}. Is a file missing or "
            "cut short? --allow-row-count takes it as it is"
        )
