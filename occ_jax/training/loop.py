"""The training loop: the host's work between jitted calls.

    prompts -> collect (rollout, rewards, mini-batches) -> updates -> log, evaluate, checkpoint

A run lives in its directory and goes on from there: starting it again resumes at the last complete
checkpoint and repeats, bit for bit, what an undisturbed run would have done. Metrics of a step are
fetched while the next one's rollout is awaited anyway, so they cost no synchronisation. Several
processes do the same, each on its share of the prompts; the first one alone writes and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from occ_jax.config import Config
from occ_jax.data.examples import Prompt
from occ_jax.data.pipeline import (
    TrainingPrompts,
    evaluation_prompts,
    iterate,
    prompts_read,
    skip_to,
    training_prompts,
)
from occ_jax.errors import UserError
from occ_jax.evaluation.evaluate import evaluate_sets
from occ_jax.files import Row, write_json
from occ_jax.models.model import num_parameters
from occ_jax.parallel.exchange import fold_in, is_first_process, on_first_process
from occ_jax.progress import Progress
from occ_jax.rl.regime import active_estimator
from occ_jax.rl.train_step import Metrics, abstract_state, place_state
from occ_jax.setup import Setup, open_setup
from occ_jax.training.charts import check_charts, open_charts
from occ_jax.training.checkpoint import Checkpoints, newest_intact
from occ_jax.training.experience import Experience, TooFewGroups, collect
from occ_jax.training.log import RunLog
from occ_jax.training.run_directory import RunDirectory
from occ_jax.training.stop import stop_requests
from occ_jax.training.warm_start import starting_params
from occ_jax.types import Batch, Params, TrainState

_ROLLOUT, _EVALUATION = 0, 1  # a step's key is folded with these
_WATCHED = {
    "reward": "critic/rewards/mean",
    "accuracy": "val/accuracy",
    "objective": "val/objective",
    "λ": "occ/coefficient_1",
    "tokens/s": "perf/throughput",
}


def train(config: Config, progress: Progress | None = None) -> dict[str, Any]:
    """Runs, or resumes, one experiment to its end.

    Args:
        config: the experiment; `run.directory` decides which run is resumed.
        progress: shows how far the run is; None for a bar or lines on standard error.

    Returns:
        The summary, as written to summary.json; its "step" is less than `run.steps` where the run
        was stopped.

    Raises:
        UserError: config and task do not fit, the directory holds another run or cannot be written,
            a checkpoint is damaged, too many updates in a row were not finite, a user's reward
            function fails.
    """
    progress = Progress() if progress is None else progress
    check_charts(config)
    with open_setup(config) as setup:
        return _train(setup, progress)


def _train(setup: Setup, progress: Progress) -> dict[str, Any]:
    config, directory = setup.config, RunDirectory(Path(setup.config.run.directory))
    evaluation = evaluation_prompts(config, setup.tokenizer, config.run.evaluation_prompts)
    training = training_prompts(config, setup.tokenizer)
    prompts = _process_prompts(config, training)
    on_first_process(lambda: directory.open(config))
    if training.epoch is not None:
        progress.say(
            f"{config.dataset.name}: {training.epoch:,} prompts an epoch, {training.overlong:,} "
            f"over {config.rollout.max_prompt_tokens:,} tokens left out"
        )
    resume_step = on_first_process(lambda: newest_intact(directory.checkpoints, progress.say))
    checkpoints = Checkpoints(
        directory.checkpoints, keep=config.run.keep_checkpoints, keep_every=config.run.keep_every
    )
    like = abstract_state(setup.model, config, setup.mesh)
    penalised = config.algorithm.kl_coefficient > 0
    reference: Params | None = None
    if resume_step is None:
        params = starting_params(setup, progress.say)
        if penalised:
            reference = jax.tree.map(jnp.copy, params["trunk"])  # the state takes the buffers over
        state = place_state(config, params, config.run.seed, setup.mesh)
    else:
        progress.say(f"resuming {directory.path} at step {resume_step} of {config.run.steps}")
        state, prompts_drawn = checkpoints.restore(resume_step, like)
        skip_to(prompts, prompts_drawn // jax.process_count())
        if penalised:
            reference = starting_params(setup, progress.say)["trunk"]
    log: RunLog | None = None
    if is_first_process():
        charts = open_charts(config, progress.say)
        log = RunLog(directory, -1 if resume_step is None else resume_step, charts)
    run = Run(setup, training, prompts, evaluation, reference, checkpoints, log)
    # A run that is asked to stop while it ends, ends.
    with stop_requests() as must_stop, checkpoints, log if log is not None else nullcontext():
        stopped = run.steps(state, resume_step, progress, must_stop)
    if stopped is not None:
        progress.say(f"stopped at step {stopped} of {config.run.steps}; start again to go on")

    def summarise() -> dict[str, Any]:
        summary = _summary(config, like.params, directory)
        write_json(directory.summary, summary)
        return summary

    return on_first_process(summarise)


def _process_prompts(
    config: Config, training: TrainingPrompts
) -> grain.DatasetIterator[list[Prompt]]:
    """Iterates over the prompts of every step that this process samples.

    Raises:
        UserError: the processes do not divide the prompts of a step.
    """
    processes, prompts = jax.process_count(), config.rollout.num_prompts
    if prompts % processes != 0:
        raise UserError(
            f"rollout.num_prompts is {prompts}; it must be a multiple of the {processes} processes"
        )
    return iterate(
        training.prompts, prompts // processes, process=jax.process_index(), num_processes=processes
    )


class _Pending(NamedTuple):
    """A step whose update metrics may still be under way on the device."""

    row: Row
    updates: list[Metrics]
    samples: list[dict[str, Any]]
    started: float  # time.monotonic() when the updates before this step were done


@dataclass(frozen=True)
class Run:
    """A run under way: its surroundings, and what is done at every step."""

    setup: Setup
    training: TrainingPrompts
    prompts: grain.DatasetIterator[list[Prompt]]  # of this process
    evaluation: dict[str, list[Prompt]]
    reference: Params | None  # trunk parameters of the KL penalty's reference
    checkpoints: Checkpoints
    log: RunLog | None  # of the first process

    def steps(
        self,
        state: TrainState,
        resume_step: int | None,
        progress: Progress,
        must_stop: Callable[[int], bool],
    ) -> int | None:
        """Does all steps that are left; returns the last one where `must_stop` ended the run."""
        config, total = self.setup.config, self.setup.config.run.steps
        done, skipped = resume_step or 0, 0
        watched: Row = {}
        if resume_step is None:
            watched = {"step": 0, **self.evaluate(state, 0), **self.data_figures()}
            if self.log is not None:
                self.log.write(watched)
        pending: _Pending | None = None
        with (
            progress.steps(config.mtp.regime, total, done) as show,
            jax.transfer_guard("disallow"),  # transfers to or from the devices here are explicit
        ):
            for step in range(done + 1, total + 1):
                with self._saved_on_error(state, step - 1, pending, skipped):
                    experience = self.collect(state, step)
                if pending is not None:
                    skipped = self.finish(pending, experience.started, skipped)
                    watched |= pending.row
                    show(step - 1, _watched_figures(watched))
                state, updates = self.update(state, experience.batches, step)
                pending = _Pending(
                    {"step": step, **experience.metrics, **self.data_figures()},
                    updates,
                    experience.samples,
                    experience.started,
                )
                evaluates = step % config.run.evaluate_every == 0 or step == total
                stopping = must_stop(step) and step < total  # asked once: a stopped step is saved
                saves = step % config.run.checkpoint_every == 0 or step == total or stopping
                if evaluates or saves:
                    jax.block_until_ready(state.params)  # evaluation and checkpoint wait anyway
                    ended = time.monotonic()
                    if evaluates:
                        pending.row.update(self.evaluate(state, step))
                    skipped = self.finish(pending, ended, skipped)
                    watched |= pending.row
                    show(step, _watched_figures(watched))
                    pending = None
                if saves:
                    self.save(state, step, self.prompts_drawn())
                if stopping:
                    return step
        return None

    def collect(self, state: TrainState, step: int) -> Experience:
        """Samples and judges the rollout of a step."""
        key = fold_in(self.setup.mesh, state.key, step, _ROLLOUT)
        return collect(self.setup, state.params, self.reference, self.prompts, key)

    def update(
        self, state: TrainState, batches: list[Batch], step: int
    ) -> tuple[TrainState, list[Metrics]]:
        """Does the updates of one rollout; nothing here waits for the device."""
        programs, config = self.setup.programs, self.setup.config
        every = 1 if active_estimator(config) is None else config.mtp.measure_every
        updates: list[Metrics] = []
        for number, batch in enumerate(batches, start=(step - 1) * len(batches)):
            update = programs.update if number % every == 0 else programs.update_between
            state, metrics = update(state, batch)
            updates.append(metrics)
        return state, updates

    def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        """Answers and judges the evaluation sets."""
        return evaluate_sets(
            self.setup,
            state.params,
            self.evaluation,
            fold_in(self.setup.mesh, state.key, step, _EVALUATION),
            num_samples=self.setup.config.run.evaluation_samples,
        )

    def save(self, state: TrainState, step: int, prompts_drawn: int) -> None:
        """Begins the checkpoint of a step, whose metrics are on disk before it."""
        if self.log is not None:
            self.log.flush()
        with jax.transfer_guard("allow"):  # orbax copies as it sees fit
            self.checkpoints.save(step, state, prompts_drawn)

    def finish(self, pending: _Pending, ended: float, skipped: int) -> int:
        """Fetches a step's update metrics and logs it.

        A row holds the mean over the step's updates, and under "per_update" the values in order.

        Args:
            pending: the step.
            ended: time.monotonic() when its updates were done, before evaluation and checkpoint.
            skipped: updates in a row that were skipped before this step.

        Returns:
            Updates in a row that were skipped up to the end of this step.

        Raises:
            UserError: they reached `run.max_skipped_updates`.
        """
        updates = [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(pending.updates)
        ]
        per_update = {
            name: [metrics[name] for metrics in updates if name in metrics]
            for name in dict.fromkeys(name for metrics in updates for name in metrics)
        }
        row = pending.row
        row.update({name: float(np.mean(values)) for name, values in per_update.items()})
        seconds = ended - pending.started
        row["timing_s/update"] = seconds - row["timing_s/rollout"] - row["timing_s/reward"]
        row["timing_s/step"] = seconds
        row["perf/throughput"] = row["rollout/tokens"] / seconds
        row["per_update"] = {
            name: values for name, values in per_update.items() if name.startswith("occ/")
        }
        if self.log is not None:
            self.log.write(row)
            self.log.write_samples({"step": row["step"], **x} for x in pending.samples)
        limit = self.setup.config.run.max_skipped_updates
        for metrics in updates:
            skipped = skipped + 1 if metrics["actor/skipped"] else 0
            if skipped >= limit:
                raise UserError(
                    f"step {row['step']}: {skipped} updates in a row had a non-finite loss or "
                    f"gradient and were skipped (run.max_skipped_updates={limit})"
                )
        return skipped

    def prompts_drawn(self) -> int:
        """Returns the number of prompts that all processes have drawn."""
        return prompts_read(self.prompts) * jax.process_count()

    def data_figures(self) -> Row:
        """Returns the size of a prepared set, and how far through it the run has come."""
        if self.training.epoch is None:
            return {}
        return {
            "data/prompts": self.training.epoch,
            "data/overlong_prompts": self.training.overlong,
            "data/epoch": self.prompts_drawn() / self.training.epoch,
        }

    @contextmanager
    def _saved_on_error(
        self, state: TrainState, step: int, pending: _Pending | None, skipped: int
    ) -> Generator[None]:
        """Saves the last whole step where the next one's experience cannot be collected.

        A checkpoint takes all processes, so several save only where all are refused alike.
        """
        prompts_drawn = self.prompts_drawn()
        try:
            yield
        except UserError as error:
            if jax.process_count() == 1 or isinstance(error, TooFewGroups):
                if pending is not None:
                    self.finish(pending, time.monotonic(), skipped)
                if step > 0 and step not in self.checkpoints.steps():
                    self.save(state, step, prompts_drawn)
            raise


def _watched_figures(row: Row) -> dict[str, float]:
    """The figures beside the progress bar."""
    return {short: row[name] for short, name in _WATCHED.items() if name in row}


def _summary(config: Config, params: Params, directory: RunDirectory) -> dict[str, Any]:
    rows = directory.rows()
    evaluated = [row for row in rows if "val/accuracy" in row]
    if not evaluated:
        raise UserError(
            f"{directory.metrics} holds no evaluation of this run: it was deleted or damaged"
        )
    before, after = (
        {k: v for k, v in row.items() if k.startswith("val/")}
        for row in (evaluated[0], evaluated[-1])
    )
    # The first step compiles, so it is no measure of the others.
    seconds = [row["timing_s/step"] for row in rows if row["step"] > 1]
    return {
        "regime": config.mtp.regime,
        "estimator": active_estimator(config),
        "seed": config.run.seed,
        "step": rows[-1]["step"],
        "parameters": num_parameters(params),
        "before": before,
        "after": after,
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
    }
