"""train, compare, evaluate, generate, plan, prepare, convert: arguments in, exit status out.

A user's mistake becomes one line on standard error and status 2, before any compute is spent.
Heavy imports happen after the arguments are understood.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import io
import math
import re
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from occ_jax import distributed
from occ_jax.config import Config, differences
from occ_jax.data.answers import KINDS
from occ_jax.errors import UserError, one_line
from occ_jax.runtime import hold_back_orbax, keep_freed_memory

if TYPE_CHECKING:
    from occ_jax.data.tokenizer import Tokenizer
    from occ_jax.models import Model
    from occ_jax.types import Params

# Fields of a model that its parameters do not depend on.
_SAME_PARAMETERS = {
    *("model.dtype", "model.remat"),
    *("model.attention_kernel", "model.attention_columns", "model.logits_columns"),
}
_OF_PROCESSES = {"train", "evaluate"}  # commands that several processes can run together
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
    if {*arguments[:1]} & _OF_PROCESSES and distributed.requested(arguments):
        return distributed.supervise(lambda: _run(arguments))
    return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    keep_freed_memory()
    hold_back_orbax()
    try:
        return _parse(list(arguments))() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs a config file's `get_config()` and applies command-line overrides.

    Args:
        path: a Python file that defines `get_config() -> Config`.
        overrides: such as ["--optimizer.learning-rate", "3e-6"].

    Raises:
        UserError: no such file, no `get_config`, an unknown field, a value that is not allowed.
    """
    if not Path(path).is_file():
        raise UserError(f"no config file {path}")
    with _errors_of(path):
        get_config = runpy.run_path(path).get("get_config")
    if not callable(get_config):
        raise UserError(f"{path} defines no function get_config()")
    with _errors_of(path):
        config = get_config()
    if not isinstance(config, Config):
        raise UserError(f"get_config() of {path} returns no occ_jax.config.Config")
    config = _of_checkpoint(config, overrides)
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(
                Config,
                default=config,
                args=list(overrides),
                prog=f"run.py COMMAND {path}",
                # A part of a model is there or not as the config file says; its fields can change.
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(captured.getvalue())) from None
    if config.model.checkpoint:
        from occ_jax.models.huggingface.load import check_config

        check_config(Path(config.model.checkpoint), config.model)
    return config


@contextlib.contextmanager
def _errors_of(path: str) -> Generator[None]:
    """What a config file raises, as one line that names the file and where in it."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error


def _of_checkpoint(config: Config, overrides: Sequence[str]) -> Config:
    """The config with the architecture of the checkpoint that it or the command line names."""
    directory, name = config.model.checkpoint, "--model.checkpoint"
    for position, argument in enumerate(overrides):
        if argument.startswith(f"{name}="):
            directory = argument.removeprefix(f"{name}=")
        elif argument == name:
            directory = "".join(overrides[position + 1 : position + 2])
    if not directory:
        return config
    from occ_jax.models.huggingface.families import FREE_FIELDS, read_config

    model = config.model
    found = read_config(directory, **{name: getattr(model, name) for name in FREE_FIELDS})
    if found.num_mtp_modules == 0:
        # Whether that will do is known after the overrides.
        found = dataclasses.replace(found, num_mtp_modules=model.num_mtp_modules)
    # Not checked as a whole yet: the overrides may say the mesh or the lengths that fit this model.
    joined = copy.copy(config)
    object.__setattr__(joined, "model", found)
    return joined


def _one_line(boxed: str) -> str:
    """What a boxed message says before its first rule, and the field it suggests."""
    text = [line.strip("│╭╰╮╯ ") for line in boxed.splitlines()]
    body = [line for line in text if line and not line.startswith("─")]
    rules = [i for i, line in enumerate(text) if line.startswith("─") and i > 0]
    said = " ".join(text[1 : rules[0]] if rules else body).strip()
    suggestion = re.search(r"(?:meant|similar)[^-]*(--[\w.-]+)", " ".join(body))
    return said + (f"; did you mean {suggestion.group(1)}?" if suggestion else "")


def _parse(arguments: list[str]) -> Callable[[], int | None]:
    """What the arguments ask for, checked and ready to run."""
    parser = _Parser(prog="run.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, run: Callable[..., int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=_OVERRIDES,
            allow_abbrev=False,
            add_help=False,
        )
        sub.add_argument("-h", "--help", nargs=0, action=_Help, help="this; after CONFIG, fields")
        sub.add_argument("config", metavar="CONFIG", help="a Python file with get_config()")
        sub.set_defaults(run=run)
        return sub

    train = add("train", _train, "train, or go on with, the run in --run.directory")
    compare = add("compare", _compare, "every regime from one starting policy: table and figures")
    compare.add_argument("--seeds", type=_positive, default=3, help="seeds a regime (3)")
    compare.add_argument("--exact", action="store_true", help="also occ with exact gradients")
    evaluate = add("evaluate", _evaluate, "accuracy, exact objective and acceptance")
    for sub in (train, evaluate):
        _add_distributed(sub)
    generate = add("generate", _generate, "prompts in, completions out")
    for sub in (evaluate, generate):
        sub.add_argument(
            "--checkpoint",
            required=True,
            help="a run directory, one of its checkpoints/<step>, or a Hugging Face directory",
        )
    evaluate.add_argument(
        "--prompts", type=_positive, help="questions a set (all; of a digit task 1024)"
    )
    evaluate.add_argument("--samples", type=_positive, default=16, help="completions each (16)")
    _add_k(evaluate)
    evaluate.add_argument(
        "--output",
        type=Path,
        help="where to keep records and tables (evaluations/<step> in the run's directory)",
    )
    evaluate.add_argument(
        "--completions", action="store_true", help="keep the completions' text in the records"
    )
    generate.add_argument(
        "--prompt", action="append", help="a prompt such as 314159=; default: five to evaluate on"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    _add_machine(add("plan", _plan, "whether the config fits a machine: compiled, never run"))
    _add_compare_evaluations(commands)
    _add_prepare(commands)
    _add_convert(commands)
    options, rest = parser.parse_known_args(arguments)
    if any(argument.startswith(distributed.FLAG) for argument in rest):
        raise UserError(
            f"{options.command} runs in one process; {distributed.FLAG}* is for train and evaluate"
        )
    if getattr(options, "checkpoint", None):
        rest = [*_model_of(Path(options.checkpoint)), *rest]
    if "config" in options:
        _refuse_unknown(commands.choices[options.command], rest)
        return functools.partial(options.run, load_config(options.config, rest), options)
    if rest:
        raise UserError(f"unknown argument {rest[0]}; {options.command} --help lists them")
    return functools.partial(options.run, options)


def _model_of(checkpoint: Path) -> list[str]:
    """The override that names the Hugging Face directory a checkpoint is, or was trained from."""
    if _is_pretrained(checkpoint):
        return ["--model.checkpoint", str(checkpoint)]
    for owner in (checkpoint, checkpoint.parent.parent):
        if (owner / "checkpoints").is_dir() and (owner / "config.json").is_file():
            from occ_jax.train import load_config

            found = load_config(owner).model.checkpoint
            return ["--model.checkpoint", found] if found else []
    return []


def _refuse_unknown(command: argparse.ArgumentParser, rest: Sequence[str]) -> None:
    """Fields of the config have a section and a point; what has none was meant for the command."""
    for argument in rest:
        name = argument.partition("=")[0]
        if name.startswith("--") and "." not in name:
            known = re.findall(r"--[\w-]+(?:\.[\w-]+)?", command.format_help())
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"{command.prog} --help lists them"
            raise UserError(f"unknown option {name}; {hint}")


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


def _add_compare_evaluations(commands: Any) -> None:
    text = "how policy B differs from policy A, question by question, from two --output directories"
    sub = commands.add_parser(
        "compare-evaluations", help=text, description=text, allow_abbrev=False
    )
    sub.add_argument("a", metavar="A", type=Path, help="an evaluation's directory")
    sub.add_argument("b", metavar="B", type=Path, help="another's, on the same questions")
    _add_k(sub)
    sub.add_argument("--output", type=Path, help="a directory for comparison.json and .md")
    sub.set_defaults(run=_compare_evaluations)


def _add_prepare(commands: Any) -> None:
    text = "check a published or own problem set and store it for training and evaluation"
    sub = commands.add_parser("prepare", help=text, description=text, allow_abbrev=False)
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
    sub.set_defaults(run=_prepare)


def _is_pretrained(directory: Path) -> bool:
    from occ_jax.models.huggingface.files import is_pretrained

    return is_pretrained(directory)


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


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    several = parser.add_argument_group(
        "several processes, on one machine or many (docs/pods.md)",
        "each is given the same command, with a process id of its own",
    )
    several.add_argument(
        "--distributed.auto",
        action="store_true",
        default=None,
        help="as JAX finds: TPU pods, SLURM, Open MPI",
    )
    several.add_argument(
        "--distributed.coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens (JAX_COORDINATOR_ADDRESS)",
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
        help="in which all must have started (120)",
    )
    several.add_argument(
        "--distributed.heartbeat-timeout",
        type=_positive,
        metavar="SECONDS",
        help="of silence after which a process is taken for dead (60)",
    )


@contextlib.contextmanager
def _joined(options: argparse.Namespace, *, asks: bool) -> Generator[None]:
    """Connected to the other processes, if there are to be any.

    `asks`: whether JAX's preemption service is asked for the SIGTERMs that it takes.
    """
    given = {
        name.removeprefix("distributed.").replace("-", "_"): value
        for name, value in vars(options).items()
        if name.startswith("distributed.")
    }
    if any(value is not None for value in given.values()) or distributed.in_environment():
        with distributed.joined(distributed.read_options(**given)):
            if not asks:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            yield
    else:
        yield


def _train(config: Config, options: argparse.Namespace) -> None:
    with _joined(options, asks=True):
        _train_here(config)


def _train_here(config: Config) -> None:
    from occ_jax.hosts import is_first
    from occ_jax.metrics import read_rows
    from occ_jax.progress import Progress
    from occ_jax.report import run_report, write_figures
    from occ_jax.train import train

    train(config, Progress(quiet=not is_first()))
    if not is_first():
        return
    directory = Path(config.run.directory)
    rows = read_rows(directory / "metrics.jsonl")
    figures = write_figures({_name(config): [rows]}, directory / "figures")
    print(run_report(rows, _name(config)))
    print("figures  " + "  ".join(str(path) for path in figures))


def _add_convert(commands: Any) -> None:
    text = "a Hugging Face directory to an orbax checkpoint, or a run or checkpoint back to one"
    sub = commands.add_parser("convert", help=text, description=text, allow_abbrev=False)
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
    sub.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from occ_jax.convert import convert

    print(convert(options.source, options.target, dtype=options.dtype, layout=options.layout))


def _prepare(options: argparse.Namespace) -> None:
    from occ_jax.data.prepare import find_set, prepare
    from occ_jax.data.published import Layout

    columns = (options.prompt_column, options.answer_column)
    described = any((*columns, options.id_column, options.answers, options.distinct))
    if described and not all(columns):
        raise UserError("your own data needs both --prompt-column and --answer-column")
    own = Layout(*columns, options.id_column) if described else None
    kind = KINDS[options.answers if options.answers else "text"]
    found = find_set(options.name, own, kind, distinct=options.distinct)
    target, summary = prepare(
        options.name,
        found,
        options.source,
        options.data_directory,
        allow_row_count=options.allow_row_count,
        drop_bad_rows=options.drop_bad_rows,
    )
    print(f"{target}: {summary.problems:,} problems of {summary.rows:,} rows")
    if summary.repeated:
        print(
            f"left out: {summary.repeated:,} rows that repeat a prompt, "
            f"{summary.contradicted:,} of them with another answer"
        )
    if summary.bad:
        print(f"left out: {summary.bad:,} rows whose answer does not parse")


def _name(config: Config) -> str:
    mtp = config.mtp
    return f"occ/{mtp.estimator}" if mtp.regime == "occ" else mtp.regime


def _compare(config: Config, options: argparse.Namespace) -> None:
    from occ_jax.compare import compare
    from occ_jax.progress import Progress

    print(compare(config, seeds=options.seeds, exact=options.exact, progress=Progress()))


def _evaluate(config: Config, options: argparse.Namespace) -> None:
    from occ_jax.evaluation.command import evaluation_directory, run_evaluation
    from occ_jax.hosts import check_hosts
    from occ_jax.sharding import make_mesh

    for k in options.k:
        if k > options.samples:
            raise UserError(f"--k is {k}; it must be at most --samples ({options.samples})")
    asked: dict[str, Any] = {
        "num_prompts": options.prompts,
        "num_samples": options.samples,
        "ks": options.k or [options.samples],
        "keep_completions": options.completions,
    }
    with _joined(options, asks=False):
        check_hosts(
            config,
            make_mesh(config.mesh),
            **asked,
            checkpoint=options.checkpoint,
            output=str(options.output),
        )
        checkpoint = _newest(Path(options.checkpoint))
        run_evaluation(
            config,
            *_load(config, checkpoint),
            checkpoint=checkpoint,
            output=options.output or evaluation_directory(checkpoint),
            **asked,
        )


def _compare_evaluations(options: argparse.Namespace) -> None:
    from occ_jax.evaluation.command import run_comparison

    run_comparison(options.a, options.b, options.k, options.output)


def _plan(config: Config, options: argparse.Namespace) -> int:
    import json

    import jax

    # With libtpu installed JAX would look for a TPU of this machine's.
    jax.config.update("jax_platforms", "cpu")
    from occ_jax.planning.machines import slices, topology, virtual
    from occ_jax.planning.plan import least, places, plan
    from occ_jax.planning.report import enough, render, to_json, verdict

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.memory is not None and options.devices is None:
        raise UserError("--memory goes with --devices; that of a TPU is known")
    if options.devices is not None:
        machines = [virtual(options.devices, options.memory)]
    elif options.topology is not None:
        machines = [topology(options.topology)]
    else:
        machines = [topology(name) for name in slices(places(config))]
        # What cannot fit is not worth the minutes of its compilation; the largest always is.
        machines = [m for m in machines[:-1] if enough(m, least(config, m), say)] + machines[-1:]
    *others, last = machines
    for machine in others:
        found = plan(config, machine, say, options.only)
        if found.fits:
            break
        say(f"{machine.name}: {verdict(found)}")
    else:
        found = plan(config, last, say, options.only)
    print(json.dumps(to_json(found)) if options.json else render(found))
    return 0 if found.fits else 1


def _generate(config: Config, options: argparse.Namespace) -> None:
    from occ_jax.generate import generate

    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature is {options.temperature}; it must be 0 or more")
    model, tokenizer, params = _load(config, _newest(Path(options.checkpoint)))
    between = "\n\n" if config.dataset.name else ""
    for prompt, completion in generate(
        model,
        config,
        tokenizer,
        params,
        prompts=options.prompt,
        temperature=options.temperature,
    ):
        print(f"{prompt}{between}{completion}{between}")


def _newest(path: Path) -> Path:
    """The checkpoint that a path stands for, the same for all processes."""
    from occ_jax.checkpoint import find_checkpoint
    from occ_jax.hosts import of_first

    # A run that still trains may have another one by the time the next process looks.
    return path if _is_pretrained(path) else Path(of_first(lambda: str(find_checkpoint(path))))


def _load(config: Config, checkpoint: Path) -> tuple[Model, Tokenizer, Params]:
    """The parameters of a checkpoint, after checking that they are of the configured model."""
    from occ_jax.checkpoint import restore_params
    from occ_jax.config import computation
    from occ_jax.data.tokenizer import model_tokenizer
    from occ_jax.models import Model, load_pretrained
    from occ_jax.rl.train_step import abstract_state
    from occ_jax.sharding import make_mesh
    from occ_jax.train import check_task_fits, load_config, same_directory

    tokenizer = model_tokenizer(config.model)
    check_task_fits(config, tokenizer)
    if _is_pretrained(checkpoint):
        model, params = load_pretrained(
            checkpoint, config=config.model, mesh=make_mesh(config.mesh)
        )
        return model, tokenizer, params
    owner = checkpoint.parent.parent
    if (owner / "config.json").exists():
        trained = load_config(owner)
        changed = [
            f"{name} is {old!r} there, {new!r} here"
            for name, (old, new) in differences(trained, config).items()
            if name.startswith("model.")
            and name not in _SAME_PARAMETERS
            and not (name == "model.checkpoint" and same_directory(old, new))
        ]
        if changed:
            raise UserError(f"{checkpoint} is of another model: {', '.join(changed)}")
    model, mesh = Model(config.model), make_mesh(config.mesh)
    like = abstract_state(model, computation(config), mesh).params
    return model, tokenizer, restore_params(checkpoint, like)
