"""The directory that a run lives in: where each of its files is, and whose run it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from occ_jax.config import Config, Fact, differences, fields_with, from_dict, to_dict
from occ_jax.errors import UserError
from occ_jax.files import PARTIAL, Row, read_rows, write_json

_CONFIG, _CHECKPOINTS, _EVALUATIONS = "config.json", "checkpoints", "evaluations"


@dataclass(frozen=True)
class RunDirectory:
    """A run's directory by its path; nothing is read or written until a method is called."""

    path: Path

    @staticmethod
    def containing(path: Path) -> RunDirectory | None:
        """Returns the run that a path is, or that a checkpoint RUN/checkpoints/STEP belongs to."""
        as_checkpoint = [p for p in (path, path.resolve()) if p.parent.name == _CHECKPOINTS]
        for owner in (path, *(checkpoint.parent.parent for checkpoint in as_checkpoint)):
            if RunDirectory(owner).checkpoints.is_dir():
                return RunDirectory(owner)
        return None

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / _CONFIG

    @property
    def metrics(self) -> Path:
        """JSON lines, a row a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """JSON lines, a row a logged completion."""
        return self.path / "samples.jsonl"

    @property
    def events(self) -> Path:
        """A directory of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def chart_id(self) -> Path:
        """JSON, the id of the run's charts at Weights & Biases."""
        return self.path / "wandb.json"

    @property
    def checkpoints(self) -> Path:
        """A directory of checkpoints, one directory a step."""
        return self.path / _CHECKPOINTS

    @property
    def figures(self) -> Path:
        """A directory of PNG files."""
        return self.path / "figures"

    @property
    def summary(self) -> Path:
        """JSON, how the run ended."""
        return self.path / "summary.json"

    def evaluation(self, step: str) -> Path:
        """Returns the directory for the records of a checkpoint's evaluation."""
        return self.path / _EVALUATIONS / step

    def config(self) -> Config:
        """Reads the config that the run was made with.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        file = self.config_file
        try:
            return from_dict(json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise UserError(
                f"{self.path} holds no {file.name}; it is not a run directory"
            ) from error
        except (json.JSONDecodeError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error}") from error

    def rows(self) -> list[Row]:
        """Reads the logged metrics."""
        return read_rows(self.metrics)

    def open(self, config: Config) -> None:
        """Makes the directory, or checks that the run in it is the config's.

        Raises:
            UserError: it cannot be written, or holds something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.config_file.exists():
                self._require_same_run(config)
            elif any(not path.name.endswith(PARTIAL) for path in self.path.iterdir()):
                raise UserError(
                    f"{self.path} is not empty and holds no run; choose another --run.directory"
                )
            write_json(self.config_file, to_dict(config))
        except OSError as error:
            raise UserError(
                f"the run directory {self.path} cannot be written: {error.strerror}"
            ) from error

    def _require_same_run(self, config: Config) -> None:
        changed = {
            name: values
            for name, values in differences(self.config(), config).items()
            if name not in fields_with(Fact.MAY_CHANGE, Config)
            and not (name == "model.checkpoint" and is_same_directory(*values))
        }
        if changed:
            listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
            raise UserError(
                f"{self.path} holds a run with another config ({listed}); choose another "
                "--run.directory"
            )


def is_same_directory(old: str, new: str) -> bool:
    """Whether two paths name one directory, or `old` has been moved since and may be `new`."""
    if not old or not new:
        return False
    return Path(old).resolve() == Path(new).resolve() or not Path(old).exists()
