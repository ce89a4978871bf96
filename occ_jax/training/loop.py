"""The training loop: what happens on the host between jitted calls.

    prompts -> collect (rollout, rewards, mini-batches) -> updates -> log, evaluate, checkpoint

A run lives in its directory and goes on from there: starting it again resumes at the last complete
checkpoint and repeats, bit for bit, what an undisturbed run would have done. Metrics of a step are
fetched while the next one's rollout is awaited anyway, so they cost no synchronisation. Of several
processes all do the same, each on its share; the first one alone writes and speaks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from occ_jax.config import Config, MeshConfig, computation, differences, from_dict, to_dict
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import (
    TrainingPrompts,
    drawn,
    evaluation_prompts,
    go_on,
    iterate,
    prompt_columns,
    training_prompts,
)
from occ_jax.data.tasks import completion_tokens, prompt_tokens
from occ_jax.data.tokenizer import Tokenizer, model_tokenizer
from occ_jax.errors import UserError
from occ_jax.evaluation.evaluate import evaluate_sets
from occ_jax.files import PARTIAL, write_json
from occ_jax.models.huggingface.load import read_layout
from occ_jax.models.model import Model, num_parameters
from occ_jax.parallel.exchange import check_processes, fold_in, is_first_process, on_first_process
from occ_jax.parallel.sharding import make_mesh
from occ_jax.progress import Progress
from occ_jax.rewards.pool import VerifierPool
from occ_jax.rewards.scoring import open_pool
from occ_jax.rl.train_step import Metrics, abstract_state, jit_train_step, place_state
from occ_jax.training.charts import check_charts, open_charts
from occ_jax.training.checkpoint import Checkpoints, newest_intact
from occ_jax.training.experience import Experience, TooFewGroups, collect
from occ_jax.training.log import Row, RunLog, read_rows
from occ_jax.training.warm_start import starting_params
from occ_jax.types import Params, TrainState

# Fields in which a run directory and the config that resumes it may differ.
_MAY_CHANGE = {
    "dataset.directory",
    "reward.workers",
    "rollout.max_rounds",
    "rollout.gather_weights",
    "model.remat",
    "model.attention_kernel",
    "model.attention_columns",
    "model.logits_columns",
    "run.directory",
    "run.steps",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.keep_every",
    "run.wandb_project",
    "warm_start.cache_directory",
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
}
_ROLLOUT, _EVALUATION = 0, 1  # what a step's key is folded with
_WATCHED = {
    "reward": "critic/rewards/mean",
    "accuracy": "val/accuracy",
    "objective": "val/objective",
    "λ": "occ/coefficient_1",
    "tokens/s": "perf/throughput",
}


class _Run(NamedTuple):
    """A run's fixed surroundings."""

    config: Config
    model: Model
    mesh: Mesh
    tokenizer: Tokenizer
    training: TrainingPrompts
    data: grain.DatasetIterator[list[Prompt]]
    evaluation: dict[str, list[Prompt]]
    reference: Params | None
    checkpoints: Checkpoints
    log: RunLog | None  # of the first process
    pool: VerifierPool


class _Pending(NamedTuple):
    """A step whose update metrics may still be under way on the device."""

    row: Row
    updates: list[Metrics]
    samples: list[dict[str, Any]]
    started: float  # time.monotonic() when the updates before this step were done


def train(config: Config, progress: Progress) -> dict[str, Any]:
    """Runs, or resumes, one experiment to its end.

    Args:
        config: the experiment; `run.directory` decides what is resumed.
        progress: shows what goes on.

    Returns:
        The summary, as written to summary.json; its "step" is less than `run.steps` where the run
        was stopped.

    Raises:
        UserError: config and task do not fit, the directory holds another run or cannot be written,
            a checkpoint is damaged, too many updates in a row were not finite, a reward function of
            the user's fails.
    """
    tokenizer = model_tokenizer(config.model)
    check_task_fits(config, tokenizer)
    check_charts(config)
    if config.model.checkpoint:
        read_layout(config.model)  # what is wrong with its files is said before anything is written
    with open_pool(config) as pool:
        return _train(config, tokenizer, pool, progress)


def _train(
    config: Config, tokenizer: Tokenizer, pool: VerifierPool, progress: Progress
) -> dict[str, Any]:
    mesh, model = make_mesh(config.mesh), Model(config.model)
    check_processes(config, mesh)
    evaluation = evaluation_prompts(config, tokenizer, config.run.evaluation_prompts)
    training = training_prompts(config, tokenizer)
    data = _share(config, training)
    directory = Path(config.run.directory)
    on_first_process(lambda: open_directory(directory, config))
    if training.epoch is not None:
        progress.say(
            f"{config.dataset.name}: {training.epoch:,} prompts an epoch, {training.overlong:,} "
            f"over {config.rollout.max_prompt_tokens:,} tokens left out"
        )
    found = on_first_process(lambda: newest_intact(directory / "checkpoints", progress.say))
    checkpoints = Checkpoints(
        directory / "checkpoints",
        keep=config.run.keep_checkpoints,
        keep_every=config.run.keep_every,
    )
    like = abstract_state(model, computation(config), mesh)
    penalised = config.algorithm.kl_coefficient > 0
    if found is None:
        begin = starting_params(config, model, mesh, tokenizer, progress.say)
        # A copy, as the state takes the buffers over.
        reference = jax.tree.map(jnp.copy, begin["trunk"]) if penalised else None
        state = place_state(computation(config), begin, config.run.seed, mesh)
    else:
        progress.say(f"resuming {directory} at step {found} of {config.run.steps}")
        state, prompts_drawn = checkpoints.restore(found, like)
        go_on(data, prompts_drawn // jax.process_count())
        reference = None
        if penalised:
            reference = starting_params(config, model, mesh, tokenizer, progress.say)["trunk"]
    log: RunLog | None = None
    if is_first_process():
        charts = open_charts(config, progress.say)
        log = RunLog(directory, -1 if found is None else found, charts)
    run = _Run(
        config,
        model,
        mesh,
        tokenizer,
        training,
        data,
        evaluation,
        reference,
        checkpoints,
        log,
        pool,
    )
    # Asked to stop while it ends, it ends.
    with _stop_requests() as stop, checkpoints, log if log is not None else nullcontext():
        stopped = _steps(run, state, found, progress, stop)
    if stopped is not None:
        progress.say(f"stopped at step {stopped} of {config.run.steps}; start again to go on")

    def summarise() -> dict[str, Any]:
        summary = _summary(config, like.params, read_rows(directory / "metrics.jsonl"))
        write_json(directory / "summary.json", summary)
        return summary

    return on_first_process(summarise)


def _share(config: Config, training: TrainingPrompts) -> grain.DatasetIterator[list[Prompt]]:
    """This process's share of the prompts of every step.

    Raises:
        UserError: they do not divide.
    """
    hosts, prompts = jax.process_count(), config.rollout.num_prompts
    if prompts % hosts != 0:
        raise UserError(
            f"rollout.num_prompts is {prompts}; it must be a multiple of the {hosts} processes"
        )
    return iterate(
        training.prompts,
        prompts // hosts,
        host=jax.process_index(),
        num_hosts=hosts,
    )


def _steps(
    run: _Run,
    state: TrainState,
    found: int | None,
    progress: Progress,
    stop: Callable[[int], bool],
) -> int | None:
    """All steps that are left; the last one, its checkpoint begun, where `stop` was asked for."""
    config, total = run.config.run, run.config.run.steps
    skipped = 0
    watched: Row = {}
    if found is None:
        watched = {"step": 0, **_evaluate(run, state, 0), **_data_figures(run)}
        if run.log is not None:
            run.log.write(watched)
    pending: _Pending | None = None
    with (
        progress.steps(run.config.mtp.regime, total, found or 0) as show,
        jax.transfer_guard("disallow"),  # what goes to or from the devices here says so
    ):
        for step in range((found or 0) + 1, total + 1):
            with _saved_on_error(run, state, step - 1, pending, skipped):
                experience = _collect(run, state, step)
            if pending is not None:
                skipped = _finish(run, pending, experience.started, skipped)
                watched |= pending.row
                show(step - 1, _figures(watched))
            state, updates = _update(run, state, experience.batches, step)
            pending = _Pending(
                {"step": step, **experience.metrics, **_data_figures(run)},
                updates,
                experience.samples,
                experience.started,
            )
            evaluates = step % config.evaluate_every == 0 or step == total
            stopping = stop(step) and step < total  # asked once: what stops here is saved here
            saves = step % config.checkpoint_every == 0 or step == total or stopping
            if evaluates or saves:
                jax.block_until_ready(state.params)  # what follows waits for them anyway
                ended = time.monotonic()
                if evaluates:
                    pending.row.update(_evaluate(run, state, step))
                skipped = _finish(run, pending, ended, skipped)
                watched |= pending.row
                show(step, _figures(watched))
                pending = None
            if saves:
                _save(run, state, step, _drawn(run))
            if stopping:
                return step
    return None


def _save(run: _Run, state: TrainState, step: int, prompts_drawn: int) -> None:
    """Begins the checkpoint of a step, whose metrics are on disk before it."""
    if run.log is not None:
        run.log.flush()
    with jax.transfer_guard("allow"):  # orbax copies as it sees fit
        run.checkpoints.save(step, state, prompts_drawn)


@contextmanager
def _saved_on_error(
    run: _Run, state: TrainState, step: int, pending: _Pending | None, skipped: int
) -> Generator[None]:
    """Saves the last step that is whole where the next one's experience cannot be had.

    Of several processes only where all are refused alike, as a checkpoint takes all of them.
    """
    prompts_drawn = _drawn(run)
    try:
        yield
    except UserError as error:
        if jax.process_count() == 1 or isinstance(error, TooFewGroups):
            if pending is not None:
                _finish(run, pending, time.monotonic(), skipped)
            if step > 0 and step not in run.checkpoints.steps():
                _save(run, state, step, prompts_drawn)
        raise


def _drawn(run: _Run) -> int:
    """Prompts that all processes have drawn."""
    return drawn(run.data) * jax.process_count()


def _collect(run: _Run, state: TrainState, step: int) -> Experience:
    return collect(
        run.model,
        run.config,
        run.mesh,
        run.tokenizer,
        state.params,
        run.reference,
        run.data,
        fold_in(run.mesh, state.key, step, _ROLLOUT),
        run.pool,
    )


def _update(
    run: _Run, state: TrainState, batches: list[Any], step: int
) -> tuple[TrainState, list[Metrics]]:
    """The updates of one rollout; nothing here waits for the device."""
    every = run.config.mtp.measure_every
    metrics: list[Metrics] = []
    for number, batch in enumerate(batches, start=(step - 1) * len(batches)):
        measure = number % every == 0
        update = jit_train_step(run.model, computation(run.config), run.mesh, measure=measure)
        state, found = update(state, batch)
        metrics.append(found)
    return state, metrics


def _finish(run: _Run, pending: _Pending, ended: float, skipped: int) -> int:
    """Fetches a step's update metrics and logs it; returns the skipped updates in a row.

    A row holds the mean over the step's updates, and under "per_update" the values in order.

    Args:
        run: where to log.
        pending: the step.
        ended: time.monotonic() when its updates were done; evaluation and checkpoints come after.
        skipped: updates in a row that were skipped before this step.
    """
    updates = [
        {name: float(value) for name, value in metrics.items()}
        for metrics in jax.device_get(pending.updates)
    ]
    per_update = {
        name: [metrics[name] for metrics in updates if name in metrics]
        for name in dict.fromkeys(name for metrics in updates for name in metrics)
    }
    pending.row.update({name: float(np.mean(values)) for name, values in per_update.items()})
    seconds = ended - pending.started
    spent = pending.row["timing_s/rollout"] + pending.row["timing_s/reward"]
    pending.row["timing_s/update"] = seconds - spent
    pending.row["timing_s/step"] = seconds
    pending.row["perf/throughput"] = pending.row["rollout/tokens"] / seconds
    pending.row["per_update"] = {
        name: values for name, values in per_update.items() if name.startswith("occ/")
    }
    step = pending.row["step"]
    if run.log is not None:
        run.log.write(pending.row)
        run.log.write_samples({"step": step, **sample} for sample in pending.samples)
    limit = run.config.run.max_skipped_updates
    for metrics in updates:
        skipped = skipped + 1 if metrics["actor/skipped"] else 0
        if skipped >= limit:
            raise UserError(
                f"step {step}: {skipped} updates in a row had a non-finite loss or gradient and "
                f"were skipped (run.max_skipped_updates={limit})"
            )
    return skipped


def _evaluate(run: _Run, state: TrainState, step: int) -> dict[str, float]:
    return evaluate_sets(
        run.model,
        run.config,
        run.mesh,
        run.tokenizer,
        state.params,
        run.evaluation,
        fold_in(run.mesh, state.key, step, _EVALUATION),
        run.pool,
        num_samples=run.config.run.evaluation_samples,
    )


def _data_figures(run: _Run) -> Row:
    """How much of a prepared set there is, and how far through it the run has come."""
    if run.training.epoch is None:
        return {}
    return {
        "data/prompts": run.training.epoch,
        "data/overlong_prompts": run.training.overlong,
        "data/epoch": _drawn(run) / run.training.epoch,
    }


def _figures(row: Row) -> dict[str, float]:
    return {short: row[name] for short, name in _WATCHED.items() if name in row}


def check_task_fits(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses what a config may be planned with but no run can start from.

    Problems need a checkpoint's tokenizer; model and rollout must be as large as tokenizer and
    prompts ask for.

    Raises:
        UserError: naming the field and what it must be.
    """
    task, rollout, model = config.task, config.rollout, config.model
    if config.dataset.name and not model.checkpoint:
        raise UserError(
            "model.checkpoint is ''; it must be a Hugging Face checkpoint's directory with "
            f"dataset.name {config.dataset.name}, whose text the digit alphabet cannot spell"
        )
    least = [
        ("model.vocab_size", model.vocab_size, tokenizer.vocab_size, "the tokenizer"),
    ]
    if not config.dataset.name:
        width, owner = prompt_columns(config), f"task {task.name}"
        least += [
            ("rollout.max_prompt_tokens", width, prompt_tokens(task), owner),
            ("rollout.max_new_tokens", rollout.max_new_tokens, completion_tokens(task), owner),
        ]
    for name, value, needed, who in least:
        if value < needed:
            raise UserError(f"{name} is {value}; {who} needs at least {needed}")
    depth, columns = model.num_mtp_modules, prompt_columns(config)
    if depth >= columns:
        raise UserError(
            f"model.num_mtp_modules is {depth}; prompts have {columns} tokens, enough for "
            f"{columns - 1}"
        )


def open_directory(directory: Path, config: Config) -> None:
    """Makes a run directory, or checks that the one that is there belongs to `config`.

    Raises:
        UserError: it cannot be written, or holds something else.
    """
    saved = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if saved.exists():
            _check_same_run(directory, load_config(directory), config)
        elif any(not path.name.endswith(PARTIAL) for path in directory.iterdir()):
            raise UserError(
                f"{directory} is not empty and holds no run; choose another --run.directory"
            )
        write_json(saved, to_dict(config))
    except OSError as error:
        raise UserError(
            f"the run directory {directory} cannot be written: {error.strerror}"
        ) from error


def load_config(directory: Path) -> Config:
    """The config a run directory was made with.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = directory / "config.json"
    try:
        return from_dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{directory} holds no config.json; it is not a run directory") from error
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _check_same_run(directory: Path, saved: Config, config: Config) -> None:
    changed = {
        name: values
        for name, values in differences(saved, config).items()
        if name not in _MAY_CHANGE and not (name == "model.checkpoint" and same_directory(*values))
    }
    if changed:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        raise UserError(
            f"{directory} holds a run with another config ({listed}); choose another "
            "--run.directory"
        )


def same_directory(old: str, new: str) -> bool:
    """Whether a checkpoint's directory is the old one, written otherwise or moved since."""
    if not old or not new:
        return False
    return Path(old).resolve() == Path(new).resolve() or not Path(old).exists()


def _summary(config: Config, params: Params, rows: list[Row]) -> dict[str, Any]:
    evaluated = [row for row in rows if "val/accuracy" in row]
    if not evaluated:
        raise UserError(
            f"{config.run.directory}/metrics.jsonl holds no evaluation of this run: it was deleted "
            "or damaged"
        )
    before, after = (
        {k: v for k, v in row.items() if k.startswith("val/")}
        for row in (evaluated[0], evaluated[-1])
    )
    # The first step compiles, so it is no measure of the others.
    seconds = [row["timing_s/step"] for row in rows if row["step"] > 1]
    return {
        "regime": config.mtp.regime,
        "estimator": config.mtp.estimator if config.mtp.regime == "occ" else None,
        "seed": config.run.seed,
        "step": rows[-1]["step"],
        "parameters": num_parameters(params),
        "before": before,
        "after": after,
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
    }


@contextmanager
def _stop_requests() -> Generator[Callable[[int], bool]]:
    """Asks, after every step, whether to stop: on SIGTERM and the first SIGINT, instead of dying.

    A second SIGINT interrupts. Of several processes JAX's preemption service takes SIGTERM and has
    all of them stop after the same step, whoever got it; a SIGINT is passed on to it. Outside the
    main thread (a notebook's worker, a test) signals stay as they are.
    """
    alone = jax.process_count() == 1
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if not alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> bool:
        return bool(received) if alone else multihost_utils.reached_preemption_sync_point(step)

    try:
        taken = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
        previous = {s: signal.signal(s, remember) for s in taken}
    except ValueError:
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
