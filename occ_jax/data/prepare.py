"""From publishers' files to a prepared set: read, check every row, drop repetitions, write.

Nothing is written before every row of every file has passed all checks, and an existing set is
never overwritten. Leaves reading prepared sets to `occ_jax.data.prepared`.
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
from occ_jax.data.published import PUBLISHED, FileColumns, ProblemSet
from occ_jax.data.rows import FileRow, column_names, read_file_rows
from occ_jax.errors import UserError


class RowCounts(NamedTuple):
    """How many rows were read, kept and left out."""

    rows: int  # read
    problems: int  # kept
    repeated: int  # left out, as an earlier row has the same prompt
    contradicted: int  # those of `repeated` whose answer differs from the earlier row's
    bad: int  # left out, as the answer does not parse


def find_set(
    name: str, own: FileColumns | None, read_answer: Callable[[Any], str], *, distinct: bool = False
) -> ProblemSet:
    """Finds a published set by its name, or describes a user's own set.

    For a published set `own`, the columns of the user's files, is None; then `read_answer` and
    `distinct`, which are as in `ProblemSet`, have no effect.

    Raises:
        UserError: the name is not well-formed, is no published set although `own` is None, or is a
            published set although `own` is given.
    """
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
        raise UserError(f"{name!r} is no name for a set: use lower-case letters, digits and _")
    if own is None and name not in PUBLISHED:
        close = difflib.get_close_matches(name, PUBLISHED, cutoff=0.5)
        suggestion = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"{name} is no published set ({', '.join(PUBLISHED)}); {suggestion}Your own data needs "
            "--prompt-column and --answer-column"
        )
    if own is not None and name in PUBLISHED:
        raise UserError(
            f"{name} is a published set with columns of its own; give your data another name"
        )
    return PUBLISHED[name] if own is None else ProblemSet((), read_answer, (own,), distinct)


def prepare(
    name: str,
    problem_set: ProblemSet,
    files: Sequence[Path],
    directory: Path,
    *,
    allow_row_count: bool = False,
    drop_bad_rows: bool = False,
) -> tuple[Path, RowCounts]:
    """Reads, checks and writes a set.

    Args:
        name: of the set, and of its directory.
        problem_set: the set's description, from `find_set`.
        files: Parquet or JSON lines, in the order of the set.
        directory: of all prepared sets.
        allow_row_count: accept a published set with another number of problems.
        drop_bad_rows: leave out rows whose answer does not parse, instead of refusing the file.

    Returns:
        The directory of the set, and the counts of its rows.

    Raises:
        UserError: the set exists already, a file cannot be read, or a row is not well-formed.
    """
    target = set_directory(directory, name)
    if target.exists():
        raise UserError(f"{target} is prepared already; delete it to prepare {name} anew")
    examples, counts = _read(name, problem_set, files, drop_bad_rows)
    _check_count(name, problem_set, files, counts, allow_row_count)
    from occ_jax.data.builder import write_set  # imports TFDS

    try:
        write_set(directory, name, examples, [file.name for file in files])
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error
    return target, counts


def _read(
    name: str, problem_set: ProblemSet, files: Sequence[Path], drop_bad_rows: bool
) -> tuple[list[Example], RowCounts]:
    """Reads and checks all examples of all files."""
    examples: dict[str | tuple[Message, ...] | int, Example] = {}
    owners: dict[str, str] = {}
    rows = repeated = contradicted = bad = 0
    for row, columns in _rows(problem_set, name, files):
        rows += 1
        prompt = _prompt(row, columns)
        answer = _answer(row, columns, problem_set.read_answer)
        if isinstance(answer, UserError):
            if not drop_bad_rows:
                raise answer
            bad += 1
            continue
        if problem_set.distinct and prompt in examples:
            repeated += 1
            contradicted += examples[prompt].answer != answer
            continue
        identity = _identity(row, columns, rows)
        if identity in owners:
            raise row.error(f"id {identity} is also the id of {owners[identity]}")
        owners[identity] = f"{row.file} row {row.number}"
        key = prompt if problem_set.distinct else rows
        examples[key] = Example(prompt, answer, source=name, id=identity)
    counts = RowCounts(rows, len(examples), repeated, contradicted, bad)
    return list(examples.values()), counts


def _rows(
    problem_set: ProblemSet, name: str, files: Sequence[Path]
) -> Iterator[tuple[FileRow, FileColumns]]:
    """Yields every row with its file's columns; all files' columns are checked first."""
    columns_of_files = [_match_columns(problem_set, name, file) for file in files]
    for file, (columns, names) in zip(files, columns_of_files, strict=True):
        for row in read_file_rows(file, names):
            yield row, columns


def _match_columns(problem_set: ProblemSet, name: str, file: Path) -> tuple[FileColumns, list[str]]:
    """The set's columns that a file has, and the names of those to read."""
    present = column_names(file)
    for columns in problem_set.columns:
        required, optional = _split_required(columns)
        if set(required) <= set(present):
            return columns, [*required, *(column for column in optional if column in present)]
    allowed = " or ".join(
        " and ".join(_split_required(columns)[0])
        + (f" ({columns.publisher})" if columns.publisher else "")
        for columns in problem_set.columns
    )
    raise UserError(f"{file} has columns {', '.join(present)}; {name} needs {allowed}")


def _split_required(columns: FileColumns) -> tuple[list[str], list[str]]:
    """Names of the required columns, and of the optional ones."""
    required, optional = [columns.prompt, columns.answer], [columns.context]
    # A user names the id column on purpose; publishers' mirrors may lack theirs.
    (optional if columns.publisher else required).append(columns.id)
    return _columns_of(required), _columns_of(optional)


def _columns_of(paths: Sequence[str]) -> list[str]:
    return [path.split(".")[0] for path in paths if path]


def _prompt(row: FileRow, columns: FileColumns) -> str | tuple[Message, ...]:
    value = row.value(columns.prompt)
    if isinstance(value, str):
        context = row.values.get(columns.context) or ""
        text = f"{context}\n{value}" if str(context).strip() else value
        return _text(row, columns.prompt, text)
    if not isinstance(value, list) or not value:
        raise row.error(f"{columns.prompt} is neither a text nor a list of messages")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise row.error(f"{columns.prompt} holds a message without role or content")
        role = _text(row, f"a role in {columns.prompt}", message["role"])
        content = _text(row, f"a content in {columns.prompt}", message["content"])
        messages.append(Message(role, content))
    if messages[-1].role != "user":
        raise row.error(f"{columns.prompt} ends with a turn of {messages[-1].role}, not of user")
    return tuple(messages)


def _answer(row: FileRow, columns: FileColumns, read: Callable[[Any], str]) -> str | UserError:
    value = row.value(columns.answer)
    try:
        return _text(row, columns.answer, read(value))
    except ValueError as error:
        return row.error(f"{columns.answer} {str(value)[-60:]!r} {error}")


def _identity(row: FileRow, columns: FileColumns, position: int) -> str:
    if columns.id and columns.id.split(".")[0] in row.values:
        return _text(row, columns.id, str(row.value(columns.id)))
    return str(position)


def _text(row: FileRow, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise row.error(f"{name} is empty" if value == "" else f"{name} is no text: {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise row.error(f"{name} is no valid Unicode text") from error
    return value


def _check_count(
    name: str, problem_set: ProblemSet, files: Sequence[Path], counts: RowCounts, allow: bool
) -> None:
    if counts.problems == 0:
        raise UserError(f"{files[0]}: no row of {counts.rows} has an answer that parses")
    if problem_set.num_problems and counts.problems not in problem_set.num_problems and not allow:
        listed = ", ".join(map(str, files))
        raise UserError(
            f"{listed}: {counts.problems:,} problems in {counts.rows:,} rows; {name} has "
            f"{' or '.join(f'{n:,}' for n in problem_set.num_problems)}. Is a file missing or "
            "incomplete? --allow-row-count accepts it as it is"
        )
