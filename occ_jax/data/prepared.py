"""Random access to the examples of prepared sets.

Leaves writing sets to `occ_jax.data.prepare` and batches of prompts to `occ_jax.data.pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from occ_jax.data.chat import Message
from occ_jax.data.examples import Example
from occ_jax.errors import UserError, one_line

VERSION = "1.0.0"  # of the records' schema
SPLIT = "problems"


def set_directory(directory: Path, name: str) -> Path:
    """Directory of a prepared set."""
    return directory / name / VERSION


class PreparedSet(NamedTuple):
    """Random access to a set."""

    size: int
    example: Callable[[int], Example]  # by its index in the publisher's order


def open_set(directory: Path, name: str) -> PreparedSet:
    """Opens a set that `occ-jax prepare` has written.

    Raises:
        UserError: the set is missing or damaged. A damaged record raises when it is read.
    """
    path = set_directory(directory, name)
    if not (path / "dataset_info.json").is_file():
        sets = sorted(p.parent.parent.name for p in directory.glob(f"*/{VERSION}/features.json"))
        raise UserError(
            f"no set {name} in {directory} (prepared sets: {', '.join(sets) or 'none'}); "
            f"occ-jax prepare {name} --source FILE --data-directory {directory}"
        )
    import tensorflow_datasets as tfds

    open_builder: Any = tfds.builder_from_directory  # its decorator hides its type
    with _require_undamaged(path):
        source = open_builder(path).as_data_source(SPLIT)

    def example(index: int) -> Example:
        with _require_undamaged(path):
            return _example(name, source[index])

    return PreparedSet(len(source), example)


@contextmanager
def _require_undamaged(path: Path) -> Generator[None]:
    """Turns any exception of a reader into one line that names the set."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} is damaged; delete it and prepare the set anew ({one_line(error)})"
        ) from error


def _example(name: str, record: dict[str, Any]) -> Example:
    problem = record["problem"].decode()
    messages = record["messages"]
    conversation = tuple(
        Message(role.decode(), content.decode())
        for role, content in zip(messages["role"], messages["content"], strict=True)
    )
    return Example(
        prompt=problem or conversation,
        answer=record["answer"].decode(),
        source=name,
        id=record["id"].decode(),
    )
