"""Reads rows of local Parquet and JSON-lines files; the content decides which of the two a file is.

Every row holds its file and number, so that an error names both in one line. Leaves the meaning of
columns to `occ_jax.data.prepare`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from occ_jax.errors import UserError, one_line

_BATCH_ROWS = 4096  # of Parquet, decoded at a time


class FileRow(NamedTuple):
    """One row of one file."""

    file: Path
    number: int  # from 1; the line's number in a JSON-lines file
    values: dict[str, Any]

    def value(self, path: str) -> Any:
        """The value of a column; "a.b" is field b of column a.

        Raises:
            UserError: the value is missing or null.
        """
        value: Any = self.values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            raise self.error(f"no value of {path}")
        return value

    def error(self, reason: str) -> UserError:
        """An error, not yet raised, that names the file, the row and the reason."""
        return UserError(f"{self.file} row {self.number}: {reason}")


def column_names(file: Path) -> list[str]:
    """The columns of a Parquet file, or of the first row of a JSON-lines file.

    Raises:
        UserError: the file is missing, cannot be read or holds no rows.
    """
    if _is_parquet(file):
        parquet = _open_parquet(file)
        if parquet.metadata.num_rows == 0:
            raise UserError(f"{file} holds no rows")
        return list(parquet.schema_arrow.names)
    for row in _json_rows(file):
        return list(row.values)
    raise UserError(f"{file} holds no rows")


def read_file_rows(file: Path, columns: Sequence[str]) -> Iterator[FileRow]:
    """Yields all rows of a file, in order.

    Args:
        file: Parquet or JSON lines.
        columns: to read from Parquet; rows of JSON lines are read whole.

    Raises:
        UserError: the file cannot be read.
    """
    if not _is_parquet(file):
        yield from _json_rows(file)
        return
    number = 0
    batches = _open_parquet(file).iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))
    try:
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield FileRow(file, number, values)
    except (OSError, ValueError) as error:  # pyarrow's own are subclasses
        raise UserError(f"{file} is damaged after row {number}: {one_line(error)}") from error


def _is_parquet(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not start:
        raise UserError(f"{file} is empty")
    return start == b"PAR1"


def _open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged Parquet: {one_line(error)}") from error


def _json_rows(file: Path) -> Iterator[FileRow]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = FileRow(file, number, {})
            try:
                values = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError too
                fault = "neither Parquet nor JSON lines" if number == 1 else "no valid JSON"
                raise row.error(f"{fault} ({one_line(error)})") from error
            if not isinstance(values, dict):
                raise row.error(f"a JSON object is expected, not {line[:40]!r}")
            yield row._replace(values=values)
