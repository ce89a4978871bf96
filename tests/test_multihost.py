"""Two processes of four devices each are one run of eight, and neither outlives the other.

Real processes on this machine, connected by JAX's coordination service and gloo.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from occ_jax.cli.arguments import main
from occ_jax.cli.config_file import load_config
from occ_jax.evaluation.records import read_records
from occ_jax.files import read_rows
from occ_jax.models import Model
from occ_jax.parallel.sharding import make_mesh
from occ_jax.progress import Progress
from occ_jax.rl.train_step import abstract_state
from occ_jax.training.checkpoint import Checkpoints
from occ_jax.training.loop import train
from tests.tiny import config_file

ROOT = Path(__file__).parent.parent
STEPS = 20
OVERRIDES = [
    *("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--model.num-kv-heads", "2"),
    *("--rollout.num-prompts", "8", "--rollout.dynamic-sampling"),
    *("--warm-start.steps", "60", "--warm-start.learning-rate", "0.01"),
    *("--run.steps", str(STEPS), "--run.checkpoint-every", "1", "--run.evaluate-every", "5"),
    # An eps far above the gradients' rounding, of which Adam would make steps of full size.
    *("--optimizer.eps", "0.01", "--optimizer.learning-rate", "0.001"),
    # The log-probability proxy measures differences so small that its rounding errors are not.
    *("--reward.workers", "1", "--mtp.estimator", "exact"),
]
SILENCE = 6  # seconds after which a process is taken for dead
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"
ANOTHER_ENDED = (
    r"error: another process has ended \(.+\); start all processes again to go on from the last "
    "checkpoint"
)
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Processes:
    """The processes of one start of a command, each with its own standard error."""

    def __init__(
        self, directory: Path, command="train", extra=((), ()), ids=(0, 1), env=({}, {}), **options
    ):
        self.directory = directory
        address = f"127.0.0.1:{free_port()}"
        options = {"initialization-timeout": 60, "heartbeat-timeout": SILENCE, **options}
        flags = [(f"--distributed.{name}", value) for name, value in options.items()]
        self.processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "run.py", command, config_file(directory)),
                    *overrides(directory),
                    *extra[number],
                    *("--distributed.coordinator", address, "--distributed.num-processes", "2"),
                    *("--distributed.process-id", str(number)),
                    *(str(part) for flag in flags for part in flag),
                ],
                cwd=ROOT,
                env={**environment(directory), **env[number]},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in ids
        ]

    def reach(self, step: int) -> None:
        """Returns when the checkpoint of a step is complete."""
        path = self.directory / "run" / "checkpoints" / str(step) / "manifest.json"
        self.until(path.exists)

    def until(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 180
        while not there():
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.005)

    def end(self, patience=120.0) -> list[tuple[int, list[str]]]:
        """Exit status and the lines that begin with "error: ", of every process."""
        found = []
        for process in self.processes:
            _, said = process.communicate(timeout=patience)
            assert "Traceback" not in said, said
            if "Check failure" in said:  # JAX aborts, unless our line and exit are quicker
                assert process.returncode in (3, -signal.SIGABRT) and ABORTED in said, said
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            found.append((process.returncode, lines))
        return found


def ended_with_another(status: int, lines: list[str]) -> bool:
    """Whether a process says that another one has ended, or was aborted by JAX for it."""
    said = len(lines) == 1 and re.fullmatch(ANOTHER_ENDED, lines[0]) is not None
    return (status == 3 and said) or (status == -signal.SIGABRT and (said or not lines))


def overrides(directory: Path) -> list[str]:
    """Of all runs; they start from the same policy."""
    return [*OVERRIDES, "--warm-start.cache-directory", str(directory.parent / "warm_starts")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(directory: Path) -> dict[str, str]:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def outcome(directory: Path):
    """The last checkpoint's arrays, and rows without what depends on the clock."""
    config = load_config(str(config_file(directory)), overrides(directory))
    like = abstract_state(Model(config.model), config, make_mesh(config.mesh))
    with Checkpoints(directory / "run" / "checkpoints", keep=2) as checkpoints:
        state, prompts_drawn = checkpoints.restore(STEPS, like)
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))}
        for row in read_rows(directory / "run" / "metrics.jsonl")
    ]
    numbers = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    return numbers, prompts_drawn, rows, read_rows(directory / "run" / "samples.jsonl")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, quick_compilation):
    directory = tmp_path_factory.mktemp("runs") / "alone"
    directory.mkdir()
    train(load_config(str(config_file(directory)), overrides(directory)), Progress(quiet=True))
    return directory


@pytest.fixture(scope="module")
def two_processes(one_process):
    directory = one_process.parent / "undisturbed"
    directory.mkdir()
    assert Processes(directory).end() == [(0, []), (0, [])]
    return directory


def test_two_processes_are_one_of_eight_devices(one_process, two_processes):
    (state, prompts, rows, samples) = outcome(two_processes)
    (alone, prompts_alone, rows_alone, samples_alone) = outcome(one_process)
    assert prompts == prompts_alone > 8 * STEPS  # some groups were drawn again
    # Of an array as a whole, as some of its entries are hardly there.
    errors = jax.tree.map(
        lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6),
        (state.params, state.opt_state),
        (alone.params, alone.opt_state),
    )
    assert max(jax.tree.leaves(errors)) <= 1e-5, errors
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert 0 < rows[-1]["critic/score/mean"] < 1
    for row, other in zip(rows, rows_alone, strict=True):
        assert row.keys() == other.keys()
        # Later updates carry on the float32 rounding of earlier ones, so the tolerance grows with
        # steps. c and λc - λ²G/2 are sums that cancel: their tolerance is a share of their terms.
        share = 3e-6 * (1 + row["step"])
        most = row.get("actor/grad_norm", 0.0) * row.get("occ/penalty_1_1", 0.0) ** 0.5
        expected = {**other, **other.get("per_update", {})}
        for name, value in {**row, **row.get("per_update", {})}.items():
            close = 1e-6
            if name == "occ/correlation_1":
                close = share * most
            elif name == "occ/predicted_gain":
                size = np.max(np.abs(expected["occ/coefficient_1"]))
                close = share * (size * most + size**2 * row["occ/penalty_1_1"])
            if name != "per_update":
                np.testing.assert_allclose(
                    value, expected[name], share, close, err_msg=f"{name} of {row['step']}"
                )
    assert samples == samples_alone


@pytest.mark.slow
def test_stopped_and_killed_by_turns_it_ends_at_the_same_bits(two_processes):
    directory = two_processes.parent / "disturbed"
    directory.mkdir()
    run = Processes(directory)
    run.reach(1)
    run.processes[1].send_signal(signal.SIGTERM)  # one is told, both stop after the same step
    assert run.end() == [(0, []), (0, [])]
    random = np.random.default_rng(0)
    saved = directory / "run" / "checkpoints"
    for victim in (1, 0, 1, 0):
        newest = max(int(path.name) for path in saved.iterdir() if path.name.isdigit())
        run = Processes(directory)
        run.reach(newest + 2)
        time.sleep(random.uniform(0, 0.2))
        run.processes[victim].kill()
        killed = time.monotonic()
        found = run.end()
        assert time.monotonic() - killed < SILENCE + 5
        assert found[victim] == (-signal.SIGKILL, [])
        assert ended_with_another(*found[1 - victim]), found
    assert Processes(directory).end() == [(0, []), (0, [])]
    (state, *rest), (other, *other_rest) = outcome(directory), outcome(two_processes)
    jax.tree.map(np.testing.assert_array_equal, state, other)
    assert rest == other_rest


VERDICT = """
import os, pathlib

def score(completion, answer, record):
    if pathlib.Path(os.environ.get("FAILS_WHEN_THERE", "/nowhere")).exists():
        raise RuntimeError("this host's verifier fails")
    return float(completion.strip() == answer)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_says_why_and_the_others_that_it_ended(one_process, failing):
    directory = one_process.parent / f"failing_{failing}"
    directory.mkdir()
    (directory / "verdict.py").write_text(VERDICT)
    extra = ("--reward.verifier", f"{directory / 'verdict.py'}:score", "--run.steps", "1000")
    # Keeping one checkpoint deletes another at every save, which takes all processes.
    extra = (*extra, "--run.keep-checkpoints", "1")
    fails = {"FAILS_WHEN_THERE": str(directory / "now")}
    run = Processes(directory, extra=(extra, extra), env=({}, fails) if failing else (fails, {}))
    run.reach(3)
    (directory / "now").touch()
    started = time.monotonic()
    found = run.end()
    assert time.monotonic() - started < SILENCE + 15
    status, (why,) = found[failing]
    assert status == 2 and "this host's verifier fails" in why
    assert ended_with_another(*found[1 - failing]), found


def test_processes_that_disagree_say_in_what(two_processes):
    directory = two_processes.parent / "disagreeing"
    directory.mkdir()
    found = Processes(directory, extra=((), ("--optimizer.clip-norm", "0.5"))).end()
    expected = "processes 0 and 1 have different configs: optimizer.clip_norm 1.0 and 0.5"
    for status, lines in found:
        assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert not (directory / "run").exists()


def test_a_coordinator_that_is_not_there_and_a_process_that_never_comes(tmp_path):
    timeout = {"initialization-timeout": 3}
    started = time.monotonic()
    alone = [Processes(tmp_path, ids=(number,), **timeout) for number in (0, 1)]
    ((status, lines),), ((other_status, other_lines),) = (run.end() for run in alone)
    assert time.monotonic() - started < 60
    assert (other_status, len(other_lines)) == (2, 1)
    assert re.match(r"error: the coordinator 127.0.0.1:\d+ cannot be reached", other_lines[0])
    assert (status, len(lines)) == (3, 1)
    assert lines[0].startswith("error: not all 2 processes have met at the coordinator 127.0.0.1")


EXCHANGE = """
import sys

import jax
import numpy as np
from jax.sharding import Mesh

number = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, number, cluster_detection_method="deactivate")
from occ_jax.parallel import exchange
from occ_jax.config import MeshConfig
from occ_jax.errors import UserError
from occ_jax.parallel.sharding import make_mesh

straight = make_mesh(MeshConfig(data=4, fsdp=2))
whole = np.arange(48, dtype=np.int32).reshape(16, 3)
own = whole[exchange.process_rows(16)]
assert own[0, 0] == 24 * number
crossed = straight.devices.reshape(2, -1).T.reshape(straight.devices.shape)
for devices, at_home in ((straight.devices, True), (crossed, False)):
    mesh = Mesh(devices, straight.axis_names)
    assert exchange._process_rows_are_local(mesh, 16) is at_home
    array = exchange.put_process_rows(mesh, own)
    assert array.shape == (16, 3)
    np.testing.assert_array_equal(exchange.get_all_rows(array), whole)
    np.testing.assert_array_equal(
        exchange.get_process_rows(mesh, exchange.put_all_rows(mesh, whole)), own
    )
    np.testing.assert_array_equal(exchange.get_process_rows(mesh, array), own)
    np.testing.assert_array_equal(exchange.put_replicated(mesh, whole).addressable_data(3), whole)
np.testing.assert_array_equal(exchange.gather_rows(own), whole)
assert list(range(5))[exchange.process_rows(5)] == [[0, 1, 2], [3, 4]][number]
assert exchange.gather_objects(["é" * number, number]) == [["", 0], ["é", 1]]
assert exchange.on_first_process(lambda: number) == 0


def refuse():
    raise UserError(f"no, says {number}")


try:
    exchange.on_first_process(refuse)
except UserError as error:
    assert str(error) == "no, says 0"
else:
    raise AssertionError("nothing was refused")
jax.distributed.shutdown()
"""


def test_blocks_travel_between_hosts_and_devices_wherever_the_mesh_puts_them(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGE, address, str(number)],
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def test_two_processes_evaluate_as_one_does_and_go_on_when_one_was_killed(one_process):
    asked = ["--checkpoint", str(one_process / "run"), "--prompts", "600", "--samples", "4"]
    ours = [*asked, "--completions", "--output", str(one_process / "evaluation")]
    assert main(["evaluate", str(config_file(one_process)), *overrides(one_process), *ours]) == 0

    directory = one_process.parent / "evaluated"
    directory.mkdir()
    asked += ["--completions", "--output", str(directory)]
    path = directory / "reverse_digits.jsonl"
    held = b""
    for number, status in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        run = Processes(directory, "evaluate", (asked, asked))
        lines = held.count(b"\n") + 20
        run.until(lambda lines=lines: path.exists() and path.read_bytes().count(b"\n") > lines)
        run.processes[1].send_signal(number)
        other, ended = run.end()
        assert ended_with_another(*other) and ended == (status, []), (other, ended)
        assert path.read_bytes().startswith(held)
        held = path.read_bytes()
        assert held.count(b"\n") < 601 and not (directory / "summary.json").exists()
    assert Processes(directory, "evaluate", (asked, asked)).end() == [(0, []), (0, [])]
    assert path.read_bytes().startswith(held)

    (header, found), (wanted_header, wanted) = map(
        read_records, (path, one_process / "evaluation" / path.name)
    )
    assert header == wanted_header and len(found) == len(wanted) == 600
    for one, other in zip(found, wanted, strict=True):
        assert one.figures == pytest.approx(other.figures, rel=1e-5)
        assert one._replace(figures={}) == other._replace(figures={})
    (ours_told, theirs_told) = (
        json.loads((output / "summary.json").read_text())["sets"]["reverse_digits"]["avg@4"]
        for output in (one_process / "evaluation", directory)
    )
    assert ours_told == theirs_told and 0 < ours_told["mean"] < 1


def test_processes_that_evaluate_differently_say_in_what(one_process):
    directory = one_process.parent / "evaluated_differently"
    directory.mkdir()
    asked = ["--checkpoint", str(one_process / "run"), "--output", str(directory / "out")]
    older = str(one_process / "run" / "checkpoints" / "7")
    run = Processes(directory, "evaluate", (asked, [*asked, "--checkpoint", older]))
    expected = f"different configs: checkpoint '{one_process / 'run'}' and '{older}'"
    for status, lines in run.end():
        assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert not (directory / "out").exists()


def test_help_is_given_whatever_the_environment(tmp_path):
    command = [sys.executable, "run.py", "train", config_file(tmp_path), "--help"]
    env = {**environment(tmp_path), "JAX_COORDINATOR_ADDRESS": "nowhere:1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--distributed.process-id" in done.stdout and "--mesh.fsdp" in done.stdout


def test_other_commands_are_of_one_process(tmp_path, capsys):
    arguments = ["generate", str(config_file(tmp_path)), "--checkpoint", "runs"]
    assert main([*arguments, "--distributed.auto"]) == 2
    expected = "error: generate runs in one process; --distributed.* is for train and evaluate\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["num-processes", "2", "process-id", "0"],
            "--distributed.coordinator, or JAX_COORDINATOR_ADDRESS, is missing",
        ),
        (["coordinator", "host"], "--distributed.num-processes, or JAX_NUM_PROCESSES, is missing"),
        (
            ["coordinator", "host", "num-processes", "2", "process-id", "0"],
            "--distributed.coordinator is 'host'; it must be host:port",
        ),
        (
            ["coordinator", "host:1", "num-processes", "2", "process-id", "2"],
            "--distributed.process-id is 2; it must be between 0 and 1",
        ),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, said):
    names, values = flags[::2], flags[1::2]
    pairs = [
        part
        for name, value in zip(names, values, strict=True)
        for part in (f"--distributed.{name}", value)
    ]
    done = subprocess.run(
        [sys.executable, "run.py", "train", config_file(tmp_path), *pairs],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, f"error: {said}\n")
