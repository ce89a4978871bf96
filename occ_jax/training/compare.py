"""Comparison of all regimes from one starting policy, over the same seeds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from occ_jax.config import AlgorithmConfig, Config, MTPConfig
from occ_jax.errors import UserError
from occ_jax.files import Row, write_json
from occ_jax.progress import Progress
from occ_jax.training.figures import comparison, comparison_table, write_figures
from occ_jax.training.loop import train
from occ_jax.training.run_directory import RunDirectory


def variants(config: Config, *, exact: bool = False) -> dict[str, Config]:
    """Returns the compared configs by name; they differ in regime and estimator alone.

    `occ/cross_batch` needs micro-batches: a config with one gets 4, or 2 if a mini-batch's prompts
    do not divide by 4.
    """
    configs: dict[str, Config] = {}
    for regime in ("detach", "ce", "policy"):
        mtp = dataclasses.replace(config.mtp, regime=regime, measure_every=1)
        configs[regime] = dataclasses.replace(config, mtp=mtp)
    for estimator in ("log_prob", "cross_batch", *(("exact",) if exact else ())):
        mtp: MTPConfig = dataclasses.replace(config.mtp, regime="occ", estimator=estimator)
        algorithm = config.algorithm
        if estimator == "cross_batch" and algorithm.micro_batches == 1:
            algorithm = _with_micro_batches(config)
        configs[f"occ/{estimator}"] = dataclasses.replace(config, mtp=mtp, algorithm=algorithm)
    return configs


def compare(config: Config, *, seeds: int, exact: bool, progress: Progress) -> str:
    """Trains every variant with every seed and reports.

    Runs are kept under <run.directory>-compare/<variant>/seed<n>, and a comparison that is started
    again goes on where it was; table.md, comparison.json and figures/ lie beside them.

    Args:
        config: the common experiment; `run.seed` is the first seed.
        seeds: runs a variant.
        exact: also `occ/exact`.
        progress: shows how far it is.

    Returns:
        The table, Markdown, and where the figures are.

    Raises:
        UserError: a run was stopped, or refused.
    """
    root = Path(f"{config.run.directory}-compare")
    compared = variants(config, exact=exact)
    runs: dict[str, list[list[Row]]] = {name: [] for name in compared}
    total, done = len(compared) * seeds, 0
    # Seeds outside, variants inside: runs that an interruption leaves are already comparable.
    for seed in range(config.run.seed, config.run.seed + seeds):
        for name, variant in compared.items():
            done += 1
            directory = RunDirectory(root / name.replace("/", "-") / f"seed{seed}")
            progress.say(f"[{done}/{total}] {name} seed {seed}")
            run = dataclasses.replace(variant.run, directory=str(directory.path), seed=seed)
            reached = train(dataclasses.replace(variant, run=run), progress)["step"]
            if reached < run.steps:
                raise UserError(
                    f"stopped at step {reached} of {name} seed {seed}; start again to go on"
                )
            runs[name].append(directory.rows())
    records = comparison(runs)
    table = comparison_table(records)
    write_json(root / "comparison.json", records)
    (root / "table.md").write_text(table + "\n")
    figures = write_figures(runs, root / "figures")
    return table + "\n\nfigures  " + "  ".join(str(path) for path in figures)


def _with_micro_batches(config: Config) -> AlgorithmConfig:
    prompts = config.rollout.num_prompts // config.algorithm.updates_per_rollout
    count = 4 if prompts % 4 == 0 else 2
    return dataclasses.replace(config.algorithm, micro_batches=count)
