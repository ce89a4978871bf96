"""Records of an evaluation, one a question, and the file that they are appended to.

A file is JSON lines: a header that identifies the policy, the questions, the sampling and the
verifier, then one line a question. An evaluation that was killed resumes after its last whole line
if its header is the same, and is refused otherwise, so a file never mixes two policies. Leaves
measures to `occ_jax.evaluation.summary`.
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
_DIGEST_DIGITS = 16  # hexadecimal, of all questions
_SHOWN_CHARACTERS = 80  # of a damaged value


class Sampled(NamedTuple):
    """The n answers to one question, before a verifier judges them."""

    tokens: np.ndarray  # int [n, R], up to R new tokens each
    texts: list[str]
    lengths: list[int]  # tokens
    truncated: list[bool]  # whether the length limit cut the answer
    figures: dict[str, float]  # of the question: "objective", "agreed_1", "drafted_1", ...


class Record(NamedTuple):
    """One question with its n judged answers."""

    id: str
    source: str
    answer: str  # the right answer
    scores: list[float]  # of the n answers
    given: list[str | None]  # the n answers, normalised by the verifier
    lengths: list[int]
    truncated: list[bool]
    failures: list[str]  # "timeout", "death" or "error" if the verifier failed, else ""
    figures: dict[str, float]
    completions: list[str] | None = None  # the whole texts, if the evaluation keeps them


class RecordFile:
    """The records of one policy on one set, on disk.

    Only the first process has the file and its `records`. All processes know `held`, the number of
    records that the file held when it was opened.
    """

    def __init__(self, path: Path, header: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Opens the file, or creates it and its directory.

        `header` is everything that the records depend on, as JSON values, besides the questions.

        Raises:
            UserError: the file holds the records of another evaluation, is damaged or cannot be
                written.
        """
        self._path = path
        self._file: IO[str] | None = None
        self.records: list[Record] = []
        self.keeps_completions: bool = header.get("completions", False)
        header = {"format": _FORMAT, **header, **_question_fields(prompts)}
        # Through JSON, so that it compares equal to a header that was read: tuples become lists.
        self.held = on_first_process(lambda: self._open(json.loads(json.dumps(header))))

    def _open(self, header: dict[str, Any]) -> int:
        path = self._path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                existing_header, self.records = _read(path)
                _require_same_header(path, existing_header, header)
            lines = [header, *(record._asdict() for record in self.records)]
            # Rewritten, without the last line if a kill cut it.
            replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
            self._file = path.open("a")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        return len(self.records)

    def append(self, records: Sequence[Record]) -> None:
        """Writes records to disk; on other processes than the first it does nothing.

        Raises:
            UserError: the file cannot be written; it is closed.
        """
        if self._file is None:
            return
        try:
            self._file.write("".join(json.dumps(record._asdict()) + "\n" for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):  # closing writes the buffer again
                self._file.close()
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from error
        self.records.extend(records)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def judged_records(
    examples: Sequence[Example], answers: Sequence[Sampled], judged: Judged, keep_completions: bool
) -> list[Record]:
    """Records of questions from the sampled answers and the verdicts, question by question.

    With `keep_completions` they hold the whole texts too.
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
    """Reads the header and the records of a file.

    Raises:
        UserError: the file cannot be read or is no file of records.
    """
    try:
        return _read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Reads all whole lines; a kill can cut only the last line."""
    *lines, cut = path.read_bytes().split(b"\n")
    if not lines:
        raise UserError(f"{path} is {'no file of evaluation records' if cut else 'empty'}")
    header, *values = (_value(path, number, line) for number, line in enumerate(lines, start=1))
    if header.get("format") != _FORMAT:
        raise UserError(f"{path} is no file of evaluation records")
    for name, kind in {"set": str, "num_questions": int, "samples": int}.items():
        if not isinstance(header.get(name), kind):
            raise UserError(f"{path} line 1 is damaged: {name} is {header.get(name)!r}")
    for number, value in enumerate(values, start=2):
        if damage := _damage(value):
            raise UserError(f"{path} line {number} is damaged: {damage}")
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
# The type of each field of a record, and of its elements.
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


def _damage(value: dict[str, Any]) -> str:
    """The reason why a line is no record; empty if it is one."""
    if unknown := [name for name in value if name not in _FIELDS]:
        return f"{unknown[0]} is no field of a record"
    for name, (kind, element) in _FIELDS.items():
        if name not in value and name not in Record._field_defaults:
            return f"{name} is missing"
        field: Any = value.get(name)
        elements: Any = field.values() if isinstance(field, dict) else field or ()
        if not isinstance(field, kind) or (
            element is not None and not all(isinstance(x, element) for x in elements)
        ):
            return f"{name} is {repr(field)[:_SHOWN_CHARACTERS]}"
        if isinstance(field, list) and (not field or len(field) != len(value["scores"])):
            return f"{name} holds {len(field)} values for {len(value['scores'])} answers"
    return ""


def _require_same_header(path: Path, existing: dict[str, Any], header: dict[str, Any]) -> None:
    differences = [
        f"{name} is {existing.get(name)!r} in the file, {header.get(name)!r} in this evaluation"
        for name in dict.fromkeys((*existing, *header))
        if existing.get(name) != header.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} holds the records of another evaluation ({'; '.join(differences)}); choose "
            "another --output"
        )


def _question_fields(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The header's fields about the questions: their number, and a digest of them and answers."""
    digest = hashlib.sha256()
    for prompt in prompts:
        example = prompt.example
        question = [example.source, example.id, example.answer, prompt.tokens]
        digest.update(json.dumps(question).encode() + b"\n")
    return {"num_questions": len(prompts), "questions": digest.hexdigest()[:_DIGEST_DIGITS]}
