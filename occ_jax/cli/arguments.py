"""The command line: arguments in, exit status out.

A user's mistake becomes one line on standard error and status 2, before any compute is spent.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from occ_jax.cli import commands
from occ_jax.cli.config_file import load_config, program
from occ_jax.cli.runtime import keep_freed_memory
from occ_jax.data.answers import KINDS
from occ_jax.errors import UserError, missing_extra, report
from occ_jax.parallel import processes
from occ_jax.version import __version__

_DESCRIPTION = "Reinforcement learning of language models that keep their MTP modules."
_OVERRIDES = "--section.field VALUE overrides a field of the config; CONFIG --help lists all fields"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Help(argparse.Action):
    """The command's own help, or, after a CONFIG, that of its fields as well."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> None:
        parser.print_help()
        if getattr(namespace, "config", None) is None:
            parser.exit()
        print()
        load_config(namespace.config, ["--help"])


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the process's exit status, 1 for a plan that does not fit."""
    try:
        command = _parse(list(arguments))
        keep_freed_memory()
        return command() or 0
    except ModuleNotFoundError as error:
        return report(UserError(missing_extra(error, "this command", "train")))
    except (UserError, KeyboardInterrupt) as error:
        return report(error)


def _parse(arguments: list[str]) -> Callable[[], int | None]:
    """The command that the arguments ask for, checked and ready to run."""
    parser = _Parser(prog=program(), description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"occ_jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for add_command in (
        *(_add_train, _add_compare, _add_evaluate, _add_compare_evaluations),
        *(_add_generate, _add_plan, _add_prepare, _add_convert),
    ):
        add_command(subparsers)
    options, rest = parser.parse_known_args(arguments)
    if any(argument.startswith(processes.FLAG) for argument in rest):
        raise UserError(
            f"{options.command} runs in one process; {processes.FLAG}* is for train and evaluate"
        )
    if getattr(options, "checkpoint", None):
        rest = [*_model_of(Path(options.checkpoint)), *rest]
    if "config" in options:
        _refuse_unknown(subparsers.choices[options.command], rest)
        return functools.partial(options.run, load_config(options.config, rest), options)
    if rest:
        raise UserError(f"unknown argument {rest[0]}; {options.command} --help lists them")
    return functools.partial(options.run, options)


def _add(subparsers: Any, name: str, run: Callable[..., int | None], text: str) -> Any:
    sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.set_defaults(run=run)
    return sub


def _add_with_config(subparsers: Any, name: str, run: Callable[..., int | None], text: str) -> Any:
    """Adds a command whose first argument is a CONFIG, and whose options override its fields."""
    sub = subparsers.add_parser(
        name, help=text, description=text, epilog=_OVERRIDES, allow_abbrev=False, add_help=False
    )
    add = sub.add_argument
    add("-h", "--help", nargs=0, action=_Help, help="this text; after CONFIG also its fields")
    add("config", metavar="CONFIG", help="a file with get_config(), or a shipped config's name")
    sub.set_defaults(run=run)
    return sub


def _add_train(subparsers: Any) -> None:
    text = "train, or resume, the run in --run.directory"
    _add_distributed(_add_with_config(subparsers, "train", commands.run_train, text))


def _add_compare(subparsers: Any) -> None:
    text = "train every regime from one starting policy; print a table, draw figures"
    add = _add_with_config(subparsers, "compare", commands.run_compare, text).add_argument
    add("--seeds", type=_positive, default=3, help="number of seeds a regime (3)")
    add("--exact", action="store_true", help="include occ with exact gradients")


def _add_evaluate(subparsers: Any) -> None:
    text = "measure a policy: accuracy, exact objective, agreement"
    sub = _add_with_config(subparsers, "evaluate", commands.run_evaluate, text)
    add = sub.add_argument
    _add_checkpoint(sub)
    add("--prompts", type=_positive, help="most questions a set (all; 1024 of a digit task)")
    add("--samples", type=_positive, default=16, help="completions a question (16)")
    _add_k(sub)
    output = "directory for records and tables (evaluations/<step> in the run's directory)"
    add("--output", type=Path, help=output)
    add("--completions", action="store_true", help="keep the completions' text in the records")
    _add_distributed(sub)


def _add_compare_evaluations(subparsers: Any) -> None:
    text = "compare policy B with policy A, question by question, from two --output directories"
    sub = _add(subparsers, "compare-evaluations", commands.run_compare_evaluations, text)
    sub.add_argument("a", metavar="A", type=Path, help="directory of an evaluation")
    sub.add_argument("b", metavar="B", type=Path, help="directory of another one, same questions")
    _add_k(sub)
    sub.add_argument("--output", type=Path, help="directory for comparison.json and .md")


def _add_generate(subparsers: Any) -> None:
    text = "print completions of prompts"
    sub = _add_with_config(subparsers, "generate", commands.run_generate, text)
    add = sub.add_argument
    _add_checkpoint(sub)
    add("--prompt", action="append", help="prompt, such as 314159= (five evaluation prompts)")
    add("--temperature", type=float, default=0.0, help="0 takes the most probable token (0)")


def _add_plan(subparsers: Any) -> None:
    text = "check whether a run fits a machine, by compiling it ahead of time"
    sub = _add_with_config(subparsers, "plan", commands.run_plan, text)
    machine, add = sub.add_mutually_exclusive_group(), sub.add_argument
    topology = "TPU slice such as v5e:4x4 or v5p:4x4x8 (the first that fits, of the mesh's size)"
    machine.add_argument("--topology", metavar="NAME", help=topology)
    devices = "use N devices of the CPU's compiler instead"
    machine.add_argument("--devices", type=_positive, metavar="N", help=devices)
    add("--memory", type=_gib, metavar="GIB", help="memory of one of the --devices")
    only = "compile these only: rollout, mini-batches, update, evaluation"
    add("--only", nargs="+", default=(), metavar="PROGRAM", help=only)
    add("--json", action="store_true", help="print the plan as one JSON object")


def _add_prepare(subparsers: Any) -> None:
    text = "check a published or own problem set and store it for training and evaluation"
    sub = _add(subparsers, "prepare", commands.run_prepare, text)
    add = sub.add_argument
    add("name", metavar="NAME", help="a published set (docs/data.md), or a new name")
    add("--source", type=Path, nargs="+", required=True, help="its files, Parquet or JSON lines")
    add(
        "--data-directory",
        type=Path,
        default=Path("data"),
        help="directory of prepared sets (data)",
    )
    add("--drop-bad-rows", action="store_true", help="leave out rows whose answer does not parse")
    add("--allow-row-count", action="store_true", help="accept another version of a published set")
    add = sub.add_argument_group("your own data", "a.b names the column b in column a").add_argument
    add("--prompt-column", help="a problem's text, or a list of {role, content}")
    add("--answer-column", help="the right answer")
    add("--id-column", default="", help="a unique id (the row's number)")
    add("--answers", choices=tuple(KINDS), help="format that answers must parse as (text)")
    add("--distinct", action="store_true", help="keep only the first of equal prompts")


def _add_convert(subparsers: Any) -> None:
    text = "convert a Hugging Face directory to an orbax checkpoint, or a run or checkpoint back"
    add = _add(subparsers, "convert", commands.run_convert, text).add_argument
    add("source", metavar="SOURCE", type=Path, help="Hugging Face directory, run or checkpoint")
    add("target", metavar="TARGET", type=Path, help="a new directory")
    types = ("source", "bfloat16", "float32")
    add("--dtype", choices=types, default="source", help="of stored tensors (as published)")
    add(
        "--layout", type=Path, help="the Hugging Face directory a run started from, if it has moved"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    sources = "a run directory, one of its checkpoints/<step>, or a Hugging Face directory"
    parser.add_argument("--checkpoint", required=True, help=sources)


def _add_k(parser: argparse.ArgumentParser) -> None:
    text = "k of pass@k and maj@k (the number of answers)"
    parser.add_argument("--k", type=_positive, nargs="+", default=[], help=text)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "several processes, on one machine or many (docs/pods.md)",
        "every process gets the same command, with its own process id",
    ).add_argument
    flag = processes.FLAG
    seconds: dict[str, Any] = {"type": _positive, "metavar": "SECONDS"}
    auto = "use JAX's cluster detection: TPU pods, SLURM, Open MPI, Kubernetes"
    add(f"{flag}auto", action="store_true", default=None, help=auto)
    coordinator = "address that process 0 listens on (JAX_COORDINATOR_ADDRESS)"
    add(f"{flag}coordinator", metavar="HOST:PORT", help=coordinator)
    add(
        f"{flag}num-processes",
        type=_positive,
        metavar="N",
        help="number of processes (JAX_NUM_PROCESSES)",
    )
    add(
        f"{flag}process-id",
        type=int,
        metavar="I",
        help="of this process, 0 to N-1 (JAX_PROCESS_ID)",
    )
    add(f"{flag}initialization-timeout", **seconds, help="time for all to start (120)")
    heartbeat = "time without a heartbeat after which a process counts as dead (60)"
    add(f"{flag}heartbeat-timeout", **seconds, help=heartbeat)


def _model_of(checkpoint: Path) -> list[str]:
    """The override that names the Hugging Face directory a checkpoint is, or was trained from."""
    from occ_jax.models.huggingface.tensors import is_pretrained
    from occ_jax.training.run_directory import RunDirectory

    if is_pretrained(checkpoint):
        return ["--model.checkpoint", str(checkpoint)]
    run = RunDirectory.containing(checkpoint)
    if run is None or not run.config_file.is_file():
        return []
    directory = run.config().model.checkpoint
    return ["--model.checkpoint", directory] if directory else []


def _refuse_unknown(command: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Fields of the config have a section and a point; what has none was meant for the command."""
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("--") and "." not in name:
            known = re.findall(r"--[\w-]+(?:\.[\w-]+)?", command.format_help())
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"{command.prog} --help lists them"
            raise UserError(f"unknown option {name}; {hint}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return size
