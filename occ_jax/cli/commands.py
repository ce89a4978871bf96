"""The commands, one function each, called with a checked config and parsed options.

Each function imports what it needs: no command waits for the imports of another.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Generator
from pathlib import Path

from occ_jax.config import Config
from occ_jax.data.answers import KINDS
from occ_jax.errors import UserError
from occ_jax.parallel import processes


def run_train(config: Config, options: argparse.Namespace) -> None:
    """Trains, then prints how accuracy, objective and λ have changed, and draws the figures."""
    from occ_jax.parallel.exchange import is_first_process
    from occ_jax.progress import Progress
    from occ_jax.rl.regime import label
    from occ_jax.training.figures import run_report, write_figures
    from occ_jax.training.loop import train
    from occ_jax.training.run_directory import RunDirectory

    with _joined(options, asks=True):
        train(config, Progress(quiet=not is_first_process()))
        if not is_first_process():
            return
    run = RunDirectory(Path(config.run.directory))
    rows = run.rows()
    figures = write_figures({label(config): [rows]}, run.figures)
    print(run_report(rows, label(config)))
    print("figures  " + "  ".join(str(path) for path in figures))


def run_compare(config: Config, options: argparse.Namespace) -> None:
    """Trains every regime from one starting policy; prints the table."""
    from occ_jax.progress import Progress
    from occ_jax.training.compare import compare

    print(compare(config, seeds=options.seeds, exact=options.exact, progress=Progress()))


def run_evaluate(config: Config, options: argparse.Namespace) -> None:
    """Judges a checkpoint; keeps records and tables, and prints the tables."""
    import dataclasses

    from occ_jax.cli.evaluate import EvaluationOptions, evaluation_directory, run_evaluation
    from occ_jax.evaluation.summary import require_ks
    from occ_jax.rewards.judging import evaluation_sources, verifier_of
    from occ_jax.setup import open_setup
    from occ_jax.training.policy import load_policy, newest_checkpoint

    ks = options.k or [options.samples]
    verifiers = [verifier_of(config, source) for source in evaluation_sources(config)]
    # Before anything is loaded. A user's function returns no answers to count for maj@k.
    require_ks(ks, options.samples, majorities=any(":" not in name for name in verifiers))
    evaluation = EvaluationOptions(
        num_prompts=options.prompts,
        num_samples=options.samples,
        ks=ks,
        keep_completions=options.completions,
    )
    shared = dataclasses.asdict(evaluation)
    shared |= {"checkpoint": options.checkpoint, "output": str(options.output)}
    with _joined(options, asks=False), open_setup(config, **shared) as setup:
        checkpoint = newest_checkpoint(Path(options.checkpoint))
        params = load_policy(config, setup.mesh, checkpoint)
        output = options.output or evaluation_directory(checkpoint)
        run_evaluation(setup, params, checkpoint, output, evaluation)


def run_compare_evaluations(options: argparse.Namespace) -> None:
    """Prints how two kept evaluations differ, question by question."""
    from occ_jax.cli.evaluate import run_comparison

    run_comparison(options.a, options.b, options.k, options.output)


def run_generate(config: Config, options: argparse.Namespace) -> None:
    """Prints prompts with a checkpoint's completions."""
    from occ_jax.cli.generate import generate
    from occ_jax.parallel.sharding import make_mesh
    from occ_jax.setup import fitting_tokenizer
    from occ_jax.training.policy import load_policy, newest_checkpoint

    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature is {options.temperature}; it must be 0 or more")
    tokenizer, mesh = fitting_tokenizer(config), make_mesh(config.mesh)
    params = load_policy(config, mesh, newest_checkpoint(Path(options.checkpoint)))
    between = "\n\n" if config.dataset.name else ""
    for prompt, completion in generate(
        config, mesh, tokenizer, params, prompts=options.prompt, temperature=options.temperature
    ):
        print(f"{prompt}{between}{completion}{between}")


def run_plan(config: Config, options: argparse.Namespace) -> int:
    """Prints the memory that each program of a run needs; returns 1 if it does not fit."""
    import json

    import jax

    # JAX would look for a TPU of this machine if libtpu is installed.
    jax.config.update("jax_platforms", "cpu")
    from occ_jax.planning.machines import slices, topology, virtual
    from occ_jax.planning.plan import minimum_bytes, num_devices, plan
    from occ_jax.planning.report import has_memory, render, to_json, verdict

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.memory is not None and options.devices is None:
        raise UserError("--memory goes with --devices; that of a TPU is known")
    if options.devices is not None:
        machines = [virtual(options.devices, options.memory)]
    elif options.topology is not None:
        machines = [topology(options.topology)]
    else:
        machines = [topology(name) for name in slices(num_devices(config))]
        # A slice that state and gradients alone exceed is not worth minutes of compilation; the
        # largest is compiled always, for its report.
        machines = [
            m for m in machines[:-1] if has_memory(m, minimum_bytes(config, m), say)
        ] + machines[-1:]
    *others, last = machines
    for machine in others:
        result = plan(config, machine, say, options.only)
        if result.fits:
            break
        say(f"{machine.name}: {verdict(result)}")
    else:
        result = plan(config, last, say, options.only)
    print(json.dumps(to_json(result)) if options.json else render(result))
    return 0 if result.fits else 1


def run_prepare(options: argparse.Namespace) -> None:
    """Stores a problem set; prints how many problems, and what was left out."""
    from occ_jax.data.prepare import find_set, prepare
    from occ_jax.data.published import FileColumns

    columns = (options.prompt_column, options.answer_column)
    described = any((*columns, options.id_column, options.answers, options.distinct))
    if described and not all(columns):
        raise UserError("your own data needs both --prompt-column and --answer-column")
    own = FileColumns(*columns, options.id_column) if described else None
    kind = KINDS[options.answers if options.answers else "text"]
    problem_set = find_set(options.name, own, kind, distinct=options.distinct)
    target, counts = prepare(
        options.name,
        problem_set,
        options.source,
        options.data_directory,
        allow_row_count=options.allow_row_count,
        drop_bad_rows=options.drop_bad_rows,
    )
    print(f"{target}: {counts.problems:,} problems of {counts.rows:,} rows")
    if counts.repeated:
        print(
            f"left out: {counts.repeated:,} rows that repeat a prompt, "
            f"{counts.contradicted:,} of them with another answer"
        )
    if counts.bad:
        print(f"left out: {counts.bad:,} rows whose answer does not parse")


def run_convert(options: argparse.Namespace) -> None:
    """Writes parameters in the other layout; prints what was written."""
    from occ_jax.cli.convert import convert

    print(convert(options.source, options.target, dtype=options.dtype, layout=options.layout))


@contextlib.contextmanager
def _joined(options: argparse.Namespace, *, asks: bool) -> Generator[None]:
    """Connects to the other processes, if options or environment name any.

    Args:
        options: parsed command line.
        asks: whether the command asks JAX's preemption service, which catches SIGTERM, when to
            stop; otherwise SIGTERM interrupts.
    """
    given = {
        name.removeprefix("distributed.").replace("-", "_"): value
        for name, value in vars(options).items()
        if name.startswith("distributed.")
    }
    if any(value is not None for value in given.values()) or processes.in_environment():
        with processes.joined(processes.read_options(**given)):
            if not asks:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            yield
    else:
        yield
