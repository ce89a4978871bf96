"""The commands evaluate and compare-evaluations, after their arguments are parsed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from occ_jax.config import Config, Fact, RolloutConfig, fields_with
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import evaluation_prompts
from occ_jax.errors import UserError
from occ_jax.evaluation import summary
from occ_jax.evaluation.evaluate import call_of, evaluate, set_key
from occ_jax.evaluation.identity import fingerprint, verifier_identity
from occ_jax.evaluation.records import Record, RecordFile
from occ_jax.files import write_json
from occ_jax.parallel.exchange import is_first_process, on_first_process
from occ_jax.progress import Progress, Step
from occ_jax.rewards.judging import verifier_of
from occ_jax.setup import Setup
from occ_jax.tables import markdown_table, print_table
from occ_jax.training.run_directory import RunDirectory
from occ_jax.types import Params

_TASK_QUESTIONS = 1024  # of a digit task, which has no end


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """The size of an evaluation, and its measures."""

    num_prompts: int | None  # the most questions a set; None for all
    num_samples: int  # n, answers a question
    ks: Sequence[int]  # k of pass@k and maj@k
    keep_completions: bool  # whether the records hold the answers' whole text


def evaluation_directory(checkpoint: Path) -> Path:
    """Returns the default directory for the records of a checkpoint's evaluation.

    It lies in the run that the checkpoint belongs to, else where the command runs.
    """
    name, run = checkpoint.resolve().name, RunDirectory.containing(checkpoint)
    return Path("evaluations") / name if run is None else run.evaluation(name)


def run_evaluation(
    setup: Setup, params: Params, checkpoint: Path, output: Path, options: EvaluationOptions
) -> None:
    """Evaluates on every set, prints the table and keeps it beside the records.

    All processes sample and judge; the first writes and prints.

    `checkpoint` is the source of `params`. `output` gets <set>.jsonl, summary.json and summary.md.

    Raises:
        UserError: `output` holds records of other parameters, questions or settings.
    """
    config, num_prompts, ks = setup.config, options.num_prompts, options.ks
    if num_prompts is None:
        num_prompts = sys.maxsize if config.dataset.name else _TASK_QUESTIONS
    sets = evaluation_prompts(config, setup.tokenizer, num_prompts)
    records = _evaluate_into(output, setup, params, sets, options)

    def conclude() -> None:
        figures = {"checkpoint": str(checkpoint), **summary.evaluation_report(records, ks)}
        cells = summary.evaluation_cells(figures)
        _write(output, "summary", figures, cells, f"# {checkpoint}", summary.NOTE)
        print(f"records, summary.json and summary.md in {output}")

    on_first_process(conclude)


def run_comparison(a: Path, b: Path, ks: Sequence[int], output: Path | None) -> None:
    """Compares two evaluations and prints the table; with `output` also into that directory.

    Raises:
        UserError: one is missing or unfinished, or they are of different questions.
    """
    first, second = summary.read_evaluation(a), summary.read_evaluation(b)
    comparison = summary.compare_evaluations(first, second, ks)
    note = summary.COMPARISON_NOTE
    for name, settings in comparison["settings"].items():
        listed = ", ".join(f"{key} {x!r} / {y!r}" for key, (x, y) in settings.items())
        note += f"\n\nThe evaluations on {name} differ in their settings: {listed}."
    cells = summary.comparison_cells(comparison)
    _write(output, "comparison", comparison, cells, f"# A {a}, B {b}", note)


def _write(
    directory: Path | None,
    name: str,
    figures: dict[str, Any],
    cells: list[list[str]],
    title: str,
    note: str,
) -> None:
    """Prints a table, and keeps it as JSON and Markdown."""
    print_table(cells)
    print(f"\n{note}")
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / f"{name}.json", figures)
        text = f"{title}\n\n{markdown_table(cells)}\n\n{note}\n"
        (directory / f"{name}.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def _evaluate_into(
    directory: Path,
    setup: Setup,
    params: Params,
    sets: Mapping[str, Sequence[Prompt]],
    options: EvaluationOptions,
) -> dict[str, list[Record]]:
    """Evaluates on every set and keeps the records in `directory`/<set>.jsonl.

    Started again it continues after the last record. Only the first process has all records.
    """
    config, progress = setup.config, Progress(quiet=not is_first_process())
    policy = fingerprint(params)
    records: dict[str, list[Record]] = {}
    files: dict[str, RecordFile] = {}
    try:
        for name, prompts in sets.items():  # all of them before any compute is spent
            header = _header(config, name, policy, options)
            files[name] = RecordFile(directory / f"{name}.jsonl", header, prompts)
        for name, prompts in sets.items():
            held = files[name].held
            if 0 < held < len(prompts):
                progress.say(f"{name}: going on after {held:,} of {len(prompts):,} questions")
            key = set_key(config, setup.mesh, name, jax.random.key(config.run.seed))
            with progress.steps(name, len(prompts), held) as step:

                def show(current: list[Record], step: Step = step) -> None:
                    accuracy = float(np.mean([record.scores for record in current]))
                    step(len(current), {"accuracy": accuracy})

                records[name] = evaluate(
                    setup, params, prompts, key, options.num_samples, file=files[name], show=show
                )
    finally:
        for file in files.values():
            file.close()
    return records


def _header(config: Config, name: str, policy: str, options: EvaluationOptions) -> dict[str, Any]:
    """All that the answers to a set's questions, and the verdicts on them, depend on."""
    rollout, ignored = config.rollout, fields_with(Fact.SAME_SAMPLES, RolloutConfig)
    return {
        "policy": policy,
        "set": name,
        "samples": options.num_samples,
        "seed": config.run.seed,
        "sampling": {k: v for k, v in dataclasses.asdict(rollout).items() if k not in ignored},
        "dtype": config.model.dtype,
        "prompts a call": call_of(config, options.num_samples).questions,
        "verifier": verifier_identity(verifier_of(config, name)),
        "truncated": config.reward.truncated,
        "deadline_s": config.reward.deadline_s,
        "memory_mib": config.reward.memory_mib,
        "completions": options.keep_completions,
    }
