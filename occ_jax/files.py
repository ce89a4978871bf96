"""Files that a reader sees whole or not at all, after a power cut as well."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PARTIAL = ".partial"
"""How the name of a file ends that is being written."""


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`replace_text` with JSON."""
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
