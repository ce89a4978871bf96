"""The TFDS builder that writes prepared sets.

Importing this module imports TFDS's writing side, so only `occ_jax.data.prepare` does, when it
writes. Leaves checking rows to `occ_jax.data.prepare` and reading to `occ_jax.data.prepared`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from occ_jax.data.examples import Example
from occ_jax.data.prepared import SPLIT, VERSION


class _SetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Problems as records of text, in the order of `examples`."""

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self, directory: Path, name: str, examples: Sequence[Example], files: Sequence[str]
    ) -> None:
        self.name = name  # pyright: ignore[reportAttributeAccessIssue] (TFDS sets it on the class)
        self._examples, self._files = examples, list(files)
        super().__init__(data_dir=str(directory), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{len(self._examples)} problems with answers that can be verified",
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "problem": text,  # empty if the publisher ships whole conversations
                    "messages": tfds.features.Sequence({"role": text, "content": text}),
                    "answer": text,
                }
            ),
            metadata=tfds.core.MetadataDict({"files": self._files}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(self._examples):
            record = {"id": example.id, "problem": "", "messages": [], "answer": example.answer}
            if isinstance(example.prompt, str):
                record["problem"] = example.prompt
            else:
                record["messages"] = [message._asdict() for message in example.prompt]
            yield index, record


def write_set(
    directory: Path, name: str, examples: Sequence[Example], files: Sequence[str]
) -> None:
    """Writes a set as array records under `directory`/`name`, whole or not at all.

    The format is array records because TFDS's Parquet writer loses rows without an error.
    """
    tfds.disable_progress_bar()
    directory.mkdir(parents=True, exist_ok=True)
    builder = _SetBuilder(directory, name, examples, files)
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=unused)
