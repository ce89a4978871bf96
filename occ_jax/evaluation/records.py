"""What an evaluation keeps of every question, and the file it is kept in while it grows.

A file is JSON lines: a header that says whose answers to what these are, then a line a question.
An evaluation that was killed goes on after its last whole line, if and only if the header is the
same: the same parameters, questions, sampling and verifier. So a file never holds two policies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import IO, Any, NamedTuple

import numpy as np

from occ_jax.data.examples import Example, Prompt
from occ_jax.errors import UserError, one_line
from occ_jax.files import replace_text
from occ_jax.parallel.exchange import on_first_process
from occ_jax.rewards.pool import Judged

_FORMAT = "occ_jax evaluation, version 1"


class Sampled(NamedTuple):
    """The n answers to one question, before they are judged."""

    tokens: np.ndarray  # int [n, R], up to R new tokens each
    texts: list[str]
    lengths: list[int]  # tokens
    truncated: list[bool]  # cut by the length limit
    figures: dict[str, float]  # of the question: "objective", "agreed_1", "drafted_1", ...


class Record(NamedTuple):
    """One question with its n answers, judged."""

    id: str
    source: str
    answer: str  # the right one
    scores: list[float]  # n
    given: list[str | None]  # the answers, normalised by the verifier
    lengths: list[int]
    truncated: list[bool]
    failures: list[str]  # "timeout", "death" or "error" of the verifier, else ""
    figures: dict[str, float]
    completions: list[str] | None = None  # whole texts, where they are kept


class RecordFile:
    """The records of one policy on one set; appended to as they come.

    Of several processes the first has the file and what is in it. All know how many records it
    `held` when it was opened.
    """

    def __init__(self, path: Path, header: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Opens the file, or makes it.

        Args:
            path: the file; its directory is made.
            header: what the records depend on; JSON values.
            prompts: the questions, in order.

        Raises:
            UserError: it holds the records of something else, is damaged or cannot be written.
        """
        self._path = path
        self._file: IO[str] | None = None
        self.records: list[Record] = []
        self.keeps_completions: bool = header.get("completions", False)
        header = {"format": _FORMAT, **header, **_questions(prompts)}
        # As it is read back: tuples are lists.
        self.held = on_first_process(lambda: self._open(json.loads(json.dumps(header))))

    def _open(self, header: dict[str, Any]) -> int:
        path = self._path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = _read(path) if path.exists() else None
            if found is not None:
                _require_same(path, found[0], header)
                self.records = found[1]
            lines = [header, *(record._asdict() for record in self.records)]
            # Anew, without the line that a kill cut short.
            replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = path.open("a")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        return len(self.records)

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; they are on disk when it returns.

        Raises:
            UserError: they cannot be written; the file is closed.
        """
        if self._file is None:
            return
        try:
            self._file.write("".join(json.dumps(record._asdict()) + "\n" for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # it still holds what it could not write
                self._file.close()
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from error
        self.records.extend(records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def judged_records(
    examples: Sequence[Example], answers: Sequence[Sampled], judged: Judged, keep_completions: bool
) -> list[Record]:
    """Records of questions from the sampled answers and the verdicts on them.

    Args:
        examples: Q questions.
        answers: to each of them.
        judged: verdicts on all answers, question by question.
        keep_completions: keep the whole texts too.
    """
    records: list[Record] = []
    for index, (example, sampled) in enumerate(zip(examples, answers, strict=True)):
        count = len(sampled.lengths)
        verdicts = slice(index * count, (index + 1) * count)
        records.append(
            Record(
                id=example.id,
                source=example.source,
                answer=example.answer,
                scores=[float(score) for score in judged.scores[verdicts]],
                given=judged.given[verdicts],
                lengths=sampled.lengths,
                truncated=sampled.truncated,
                failures=judged.failures[verdicts],
                figures=sampled.figures,
                completions=sampled.texts if keep_completions else None,
            )
        )
    return records


def read_records(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of a file.

    Raises:
        UserError: it cannot be read or is no file of records.
    """
    try:
        return _read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """All whole lines; one that a kill cut short can only be the last."""
    *lines, rest = path.read_bytes().split(b"\n")
    if not lines:
        raise UserError(f"{path} is {'no file of evaluation records' if rest else 'empty'}")
    header, *values = (_value(path, number, line) for number, line in enumerate(lines, start=1))
    if header.get("format") != _FORMAT:
        raise UserError(f"{path} is no file of evaluation records")
    for name, kind in {"set": str, "num_questions": int, "samples": int}.items():
        if not isinstance(header.get(name), kind):
            raise UserError(f"{path} line 1 is damaged: {name} is {header.get(name)!r}")
    for number, value in enumerate(values, start=2):
        if wrong := _wrong(value):
            raise UserError(f"{path} line {number} is damaged: {wrong}")
    return header, [Record(**value) for value in values]


def _value(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is damaged: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} line {number} is damaged: it is no JSON object")
    return value


_NUMBER = (int, float)
# The kind of each field, and of its elements where it holds n of them.
_FIELDS: dict[str, tuple[Any, Any]] = {
    **dict.fromkeys(("id", "source", "answer"), (str, None)),
    "scores": (list, _NUMBER),
    "given": (list, (str, NoneType)),
    "lengths": (list, int),
    "truncated": (list, bool),
    "failures": (list, str),
    "figures": (dict, _NUMBER),
    "completions": ((list, NoneType), str),
}


def _wrong(value: dict[str, Any]) -> str:
    """What keeps a line from being a record; empty where nothing does."""
    if unknown := [name for name in value if name not in _FIELDS]:
        return f"{unknown[0]} is no field of a record"
    for name, (kind, element) in _FIELDS.items():
        if name not in value and name not in Record._field_defaults:
            return f"{name} is missing"
        found: Any = value.get(name)
        elements: Any = found.values() if isinstance(found, dict) else found or ()
        if not isinstance(found, kind) or (
            element is not None and not all(isinstance(x, element) for x in elements)
        ):
            return f"{name} is {repr(found)[:80]}"
        if isinstance(found, list) and (not found or len(found) != len(value["scores"])):
            return f"{name} holds {len(found)} values for {len(value['scores'])} answers"
    return ""


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    changed = [
        f"{name} {there.get(name)!r} there, {here.get(name)!r} here"
        for name in dict.fromkeys((*there, *here))
        if there.get(name) != here.get(name)
    ]
    if changed:
        raise UserError(
            f"{path} holds the records of another evaluation ({'; '.join(changed)}); choose "
            "another --output"
        )


def _questions(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """How many there are, and a digest of all that is asked and what is right."""
    digest = hashlib.sha256()
    for prompt in prompts:
        example = prompt.example
        asked = [example.source, example.id, example.answer, prompt.tokens]
        digest.update(json.dumps(asked).encode() + b"\n")
    return {"num_questions": len(prompts), "questions": digest.hexdigest()[:16]}
