"""`run.py evaluate` and `run.py compare-evaluations`, after the arguments are understood."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from occ_jax.config import Config
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import evaluation_prompts
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.errors import UserError
from occ_jax.evaluation import tables
from occ_jax.evaluation.evaluate import call_of, evaluate, set_key
from occ_jax.evaluation.identity import fingerprint, verifier_identity
from occ_jax.evaluation.records import Record, RecordFile
from occ_jax.files import write_json
from occ_jax.models.model import Model
from occ_jax.parallel.exchange import is_first_process, on_first_process
from occ_jax.parallel.sharding import make_mesh
from occ_jax.progress import Progress
from occ_jax.rewards.pool import VerifierPool
from occ_jax.rewards.scoring import open_pool, verifier_of
from occ_jax.tables import markdown_table, print_table
from occ_jax.types import Params

_TASK_QUESTIONS = 1024  # of a digit task, which has no end
# Fields of the rollout that shape training alone, or how many prompts a call takes.
_NOT_SAMPLING = {"num_prompts", "group_size", "old_log_probs", "dynamic_sampling", "max_rounds"}


def evaluation_directory(checkpoint: Path) -> Path:
    """Where the records of a checkpoint's evaluation go unless told otherwise.

    Beside the checkpoints of a run, which lie in RUN/checkpoints/STEP; else where the command runs.
    """
    for place in (checkpoint, checkpoint.resolve()):
        if place.parent.name == "checkpoints":
            return place.parent.parent / "evaluations" / place.name
    return Path("evaluations") / checkpoint.resolve().name


def run_evaluation(
    config: Config,
    model: Model,
    tokenizer: Tokenizer,
    params: Params,
    *,
    checkpoint: Path,
    output: Path,
    num_prompts: int | None,
    num_samples: int,
    ks: Sequence[int],
    keep_completions: bool,
) -> None:
    """Evaluates on every set, prints the table and keeps it beside the records.

    Of several processes all sample and judge, and the first writes and prints.

    Args:
        config: sets, sampling and verifiers.
        model: the architecture.
        tokenizer: of the prompts.
        params: of the policy.
        checkpoint: where they are from, for the record.
        output: gets <set>.jsonl, summary.json and summary.md.
        num_prompts: the most questions a set; None for all.
        num_samples: n, answers a question.
        ks: of pass@k and maj@k.
        keep_completions: keep the answers' text too.

    Raises:
        UserError: `output` holds records of other parameters, questions or settings; a k is too
            large, or too small for so many samples.
    """
    if num_prompts is None:
        num_prompts = sys.maxsize if config.dataset.name else _TASK_QUESTIONS
    sets = evaluation_prompts(config, tokenizer, num_prompts)
    voted = any(":" not in verifier_of(config, name) for name in sets)
    tables.require_ks(ks, num_samples, majorities=voted)  # before anything is sampled
    with open_pool(config) as pool:
        found = _evaluate_into(
            output,
            model,
            config,
            make_mesh(config.mesh),
            tokenizer,
            params,
            sets,
            pool,
            Progress(quiet=not is_first_process()),
            num_samples=num_samples,
            keep_completions=keep_completions,
        )

    def conclude() -> None:
        figures = {"checkpoint": str(checkpoint), **tables.evaluation_report(found, ks)}
        cells = tables.evaluation_cells(figures)
        _write(output, "summary", figures, cells, f"# {checkpoint}", tables.NOTE)
        print(f"records, summary.json and summary.md in {output}")

    on_first_process(conclude)


def run_comparison(a: Path, b: Path, ks: Sequence[int], output: Path | None) -> None:
    """Compares two evaluations and prints the table; also into `output`, where there is one.

    Raises:
        UserError: one is missing or unfinished, or they are of different questions.
    """
    found = tables.compare_evaluations(tables.read_evaluation(a), tables.read_evaluation(b), ks)
    note = tables.COMPARISON_NOTE
    for name, settings in found["settings"].items():
        listed = ", ".join(
            f"{key} {ours!r} / {theirs!r}" for key, (ours, theirs) in settings.items()
        )
        note += f"\n\nThe evaluations on {name} differ in their settings: {listed}."
    _write(output, "comparison", found, tables.comparison_cells(found), f"# A {a}, B {b}", note)


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
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    sets: Mapping[str, Sequence[Prompt]],
    pool: VerifierPool,
    progress: Progress,
    *,
    num_samples: int,
    keep_completions: bool,
) -> dict[str, list[Record]]:
    """Evaluates on every set with the records kept in `directory`/<set>.jsonl.

    Started again it goes on where it was. Of several processes the first has all records.

    Raises:
        UserError: the directory holds records of other parameters, questions or settings.
    """
    policy = fingerprint(params)
    files: dict[str, RecordFile] = {}
    try:
        for name, prompts in sets.items():  # all of them before any compute is spent
            header = _header(config, name, policy, num_samples, keep_completions)
            files[name] = RecordFile(directory / f"{name}.jsonl", header, prompts)
        found: dict[str, list[Record]] = {}
        for name, prompts in sets.items():
            held = files[name].held
            if 0 < held < len(prompts):
                progress.say(f"{name}: going on after {held:,} of {len(prompts):,} questions")
            with progress.steps(name, len(prompts), held) as step:
                found[name] = evaluate(
                    model,
                    config,
                    mesh,
                    tokenizer,
                    params,
                    prompts,
                    set_key(config, mesh, name, jax.random.key(config.run.seed)),
                    pool,
                    num_samples=num_samples,
                    file=files[name],
                    keep_completions=keep_completions,
                    show=lambda records, step=step: step(
                        len(records),
                        {"accuracy": float(np.mean([record.scores for record in records]))},
                    ),
                )
    finally:
        for file in files.values():
            file.close()
    return found


def _header(
    config: Config, name: str, policy: str, num_samples: int, keep_completions: bool
) -> dict[str, Any]:
    """All that the answers to a set's questions, and the verdicts on them, depend on."""
    sampling = dataclasses.asdict(config.rollout)
    return {
        "policy": policy,
        "set": name,
        "samples": num_samples,
        "seed": config.run.seed,
        "sampling": {k: v for k, v in sampling.items() if k not in _NOT_SAMPLING},
        "dtype": config.model.dtype,
        "prompts a call": call_of(config, num_samples).questions,
        "verifier": verifier_identity(verifier_of(config, name)),
        "truncated": config.reward.truncated,
        "deadline_s": config.reward.deadline_s,
        "memory_mib": config.reward.memory_mib,
        "completions": keep_completions,
    }
