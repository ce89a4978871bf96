"""Files that a reader sees whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that a reader sees all of it or none."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json_text(value))
    os.replace(temporary, path)
