"""train, compare, evaluate, generate, plan, prepare, convert: arguments in, exit status out.

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

from occ_jax import __version__
from occ_jax.cli import commands
from occ_jax.cli.config_file import load_config, program
from occ_jax.cli.runtime import keep_freed_memory
from occ_jax.data.answers import KINDS
from occ_jax.errors import UserError, missing_extra, report
from occ_jax.parallel import processes

_OVERRIDES = "[--section.field VALUE ...]  overrides the config; CONFIG --help lists the fields"


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
    """What the arguments ask for, checked and ready to run."""
    parser = _Parser(prog=program(), description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"occ_jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, run: Callable[..., int | None], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=text,
            description=text,
            epilog=_OVERRIDES,
            allow_abbrev=False,
            add_help=False,
        )
        sub.add_argument("-h", "--help", nargs=0, action=_Help, help="this; after CONFIG, fields")
        sub.add_argument(
            "config",
            metavar="CONFIG",
            help="a file with get_config(), or a shipped config's name",
        )
        sub.set_defaults(run=run)
        return sub

    train = add("train", commands.run_train, "train, or go on with, the run in --run.directory")
    compare = add(
        "compare", commands.run_compare, "every regime from one starting policy: table and figures"
    )
    compare.add_argument("--seeds", type=_positive, default=3, help="seeds a regime (3)")
    compare.add_argument("--exact", action="store_true", help="also occ with exact gradients")
    evaluate = add("evaluate", commands.run_evaluate, "accuracy, exact objective and acceptance")
    for sub in (train, evaluate):
        _add_distributed(sub)
    generate = add("generate", commands.run_generate, "prompts in, completions out")
    for sub in (evaluate, generate):
        sub.add_argument(
            "--checkpoint",
            required=True,
            help="a run directory, one of its checkpoints/<step>, or a Hugging Face directory",
        )
    _add_evaluate(evaluate)
    _add_generate(generate)
    _add_machine(
        add("plan", commands.run_plan, "whether the config fits a machine: compiled, never run")
    )
    _add_compare_evaluations(subparsers)
    _add_prepare(subparsers)
    _add_convert(subparsers)
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


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several processes, on one machine or many (docs/pods.md)",
        "every process gets the same command, with its own process id",
    )
    several.add_argument(
        "--distributed.auto",
        action="store_true",
        default=None,
        help="use JAX's cluster detection: TPU pods, SLURM, Open MPI, Kubernetes",
    )
    several.add_argument(
        "--distributed.coordinator",
        metavar="HOST:PORT",
        help="address that process 0 listens on (JAX_COORDINATOR_ADDRESS)",
    )
    several.add_argument(
        "--distributed.num-processes", type=_positive, metavar="N", help="(JAX_NUM_PROCESSES)"
    )
    several.add_argument(
        "--distributed.process-id", type=int, metavar="I", help="0 to N-1 (JAX_PROCESS_ID)"
    )
    several.add_argument(
        "--distributed.initialization-timeout",
        type=_positive,
        metavar="SECONDS",
        help="time in which all processes must have started (120)",
    )
    several.add_argument(
        "--distributed.heartbeat-timeout",
        type=_positive,
        metavar="SECONDS",
        help="time without a heartbeat after which a process counts as dead (60)",
    )


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", type=_positive, help="questions a set (all; of a digit task 1024)"
    )
    parser.add_argument("--samples", type=_positive, default=16, help="completions each (16)")
    _add_k(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help="where to keep records and tables (evaluations/<step> in the run's directory)",
    )
    parser.add_argument(
        "--completions", action="store_true", help="keep the completions' text in the records"
    )


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", help="a prompt such as 314159=; default: five to evaluate on"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )


def _add_k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--k", type=_positive, nargs="+", default=[], help="of pass@k and maj@k (all answers)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument(
        "--topology",
        metavar="NAME",
        help="a TPU slice such as v5e:4x4 or v5p:4x4x8 (the first that fits of those with as many "
        "chips as the mesh has places)",
    )
    machine.add_argument(
        "--devices", type=_positive, metavar="N", help="N devices of the CPU's compiler instead"
    )
    parser.add_argument(
        "--memory", type=_gib, metavar="GIB", help="memory of one of them, to compare with"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PROGRAM", help="of rollout, mini-batches, update"
    )
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")


def _add_compare_evaluations(subparsers: Any) -> None:
    text = "how policy B differs from policy A, question by question, from two --output directories"
    sub = subparsers.add_parser(
        "compare-evaluations", help=text, description=text, allow_abbrev=False
    )
    sub.add_argument("a", metavar="A", type=Path, help="an evaluation's directory")
    sub.add_argument("b", metavar="B", type=Path, help="another's, on the same questions")
    _add_k(sub)
    sub.add_argument("--output", type=Path, help="a directory for comparison.json and .md")
    sub.set_defaults(run=commands.run_compare_evaluations)


def _add_prepare(subparsers: Any) -> None:
    text = "check a published or own problem set and store it for training and evaluation"
    sub = subparsers.add_parser("prepare", help=text, description=text, allow_abbrev=False)
    sub.add_argument("name", metavar="NAME", help="a published set (docs/data.md), or a new name")
    sub.add_argument(
        "--source", type=Path, nargs="+", required=True, help="its files, Parquet or JSON lines"
    )
    sub.add_argument("--data-directory", type=Path, default=Path("data"), help="where to (data)")
    own = sub.add_argument_group("your own data", "columns of nested fields are written a.b")
    own.add_argument("--prompt-column", help="a problem's text, or a list of {role, content}")
    own.add_argument("--answer-column", help="the right answer")
    own.add_argument("--id-column", default="", help="a unique id; default: the row's number")
    own.add_argument("--answers", choices=tuple(KINDS), help="what they must parse as (text)")
    own.add_argument("--distinct", action="store_true", help="keep the first of equal prompts")
    sub.add_argument(
        "--drop-bad-rows", action="store_true", help="leave out rows whose answer does not parse"
    )
    sub.add_argument(
        "--allow-row-count", action="store_true", help="take another version of a published set"
    )
    sub.set_defaults(run=commands.run_prepare)


def _add_convert(subparsers: Any) -> None:
    text = "a Hugging Face directory to an orbax checkpoint, or a run or checkpoint back to one"
    sub = subparsers.add_parser("convert", help=text, description=text, allow_abbrev=False)
    sub.add_argument("source", metavar="SOURCE", type=Path, help="what there is; decides which way")
    sub.add_argument("target", metavar="TARGET", type=Path, help="a new directory")
    sub.add_argument(
        "--dtype",
        choices=("source", "bfloat16", "float32"),
        default="source",
        help="of the stored tensors (source: as published)",
    )
    sub.add_argument(
        "--layout",
        type=Path,
        help="the Hugging Face directory a run started from, if it has moved since",
    )
    sub.set_defaults(run=commands.run_convert)


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
