"""Files that a reader sees whole or not at all, even after a power cut, and JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""Ending of the name of a file that is being written."""

Row = dict[str, Any]
"""One line of a JSON lines file."""


def json_text(value: Any) -> str:
    """Returns the text that `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `replace_text` does."""
    replace_text(path, json_text(value))


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or none; on disk when it returns."""
    temporary = path.with_name(path.name + PARTIAL)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_rows(path: Path) -> list[Row]:
    """Reads a JSON lines file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows: list[Row] = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
