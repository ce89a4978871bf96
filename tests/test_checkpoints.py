"""A run's checkpoints: written while it goes on, never half there, restored on any mesh."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import absl.logging
import jax
import numpy as np
import pytest

import occ_jax.training.checkpoint
from occ_jax.config import MeshConfig
from occ_jax.data.pipeline import iterate, prompts_read, skip_to, training_prompts
from occ_jax.data.tokenizer import DIGITS
from occ_jax.errors import UserError
from occ_jax.models import Model
from occ_jax.parallel.sharding import make_mesh, state_shardings
from occ_jax.progress import Progress
from occ_jax.rl.train_step import abstract_state, place_state
from occ_jax.training.checkpoint import (
    Checkpoints,
    damage,
    find_checkpoint,
    newest_intact,
    save_params,
)
from occ_jax.training.loop import train
from occ_jax.training.run_directory import RunDirectory
from tests.tiny import config_file, tiny_config

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


def config_on(mesh, directory=Path("unused"), **run):
    """The tiny experiment, with two key-value heads to split."""
    config = tiny_config(directory, **run)
    model = dataclasses.replace(config.model, num_kv_heads=2)
    return dataclasses.replace(config, model=model, mesh=mesh)


@pytest.fixture(scope="module")
def one_device(quick_compilation):
    """A state with a different number in every place, on one device."""
    config = config_on(MeshConfig())
    shapes = jax.eval_shape(Model(config.model).init, jax.random.key(0))
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]
    params = jax.tree.unflatten(structure, values)
    return place_state(config, params, 7, make_mesh(config.mesh))


def like(mesh_config):
    config = config_on(mesh_config)
    return abstract_state(Model(config.model), config, make_mesh(mesh_config))


def numbers(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, numbers(one), numbers(other))


def on_disk(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_any_mesh_reads_what_another_wrote(one_device, tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, one_device, 40)
        checkpoints.wait()
        spread, prompts = checkpoints.restore(1, like(EIGHT))
        assert prompts == 40
        assert_equal(spread, one_device)
        mesh = make_mesh(EIGHT)
        assert jax.tree.map(lambda x: x.sharding, spread) == state_shardings(mesh, spread)
        split = [x for x in jax.tree.leaves(spread.params) if not x.is_fully_replicated]
        assert len(split) > len(jax.tree.leaves(spread.params)) / 2
        checkpoints.save(2, spread, 44)
        checkpoints.wait()
        back, _ = checkpoints.restore(2, like(MeshConfig()))
    assert_equal(back, one_device)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(back))


def test_a_run_may_go_on_on_another_mesh_but_not_with_another_model(tmp_path):
    RunDirectory(tmp_path / "run").open(config_on(MeshConfig()))
    RunDirectory(tmp_path / "run").open(config_on(EIGHT))
    assert RunDirectory(tmp_path / "run").config().mesh == EIGHT
    slower = dataclasses.replace(config_on(EIGHT).model, remat="full", logits_columns=2)
    RunDirectory(tmp_path / "run").open(dataclasses.replace(config_on(EIGHT), model=slower))
    other = tiny_config(tmp_path)
    other = dataclasses.replace(other, warm_start=config_on(EIGHT).warm_start)
    with pytest.raises(UserError, match=r"another config \(model.num_kv_heads 2 -> 1\)"):
        RunDirectory(tmp_path / "run").open(other)


def test_training_does_not_wait_for_the_files(one_device, tmp_path, monkeypatch):
    """While the manifest is held up, the state is donated, overwritten, and saved all the same."""
    may_close = threading.Event()
    close = occ_jax.training.checkpoint._close
    monkeypatch.setattr(
        occ_jax.training.checkpoint, "_close", lambda path: (may_close.wait(60), close(path))
    )
    state = jax.tree.map(lambda x: x.copy(), one_device)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        begun = time.monotonic()
        checkpoints.save(3, state, 0)
        assert time.monotonic() - begun < 30, "the manifest was waited for"
        change = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
        rest = change(change(state.params))
        jax.block_until_ready(rest)
        while not (tmp_path / "3").exists():  # by now orbax may still be writing
            time.sleep(0.01)
        assert damage(tmp_path / "3") == "it was never finished"
        with pytest.raises(UserError, match="no complete checkpoint"):
            find_checkpoint(tmp_path.parent)
        may_close.set()
        checkpoints.wait()
        assert damage(tmp_path / "3") is None
        found, _ = checkpoints.restore(3, like(MeshConfig()))
    assert_equal(found, one_device)


def test_the_newest_are_kept_and_every_fourth(one_device, tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=4) as checkpoints:
        for step in range(2, 12):
            checkpoints.save(step, one_device, 0)
            assert len(checkpoints.steps()) <= 3 + step // 4
    assert on_disk(tmp_path) == [4, 8, 10, 11]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(12, one_device, 0)
    assert on_disk(tmp_path) == [12]


def test_the_last_complete_one_goes_only_when_its_successor_is(one_device, tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, one_device, 0)
        checkpoints.wait()
        held, may_close = threading.Event(), threading.Event()
        close = occ_jax.training.checkpoint._close
        monkeypatch.setattr(
            occ_jax.training.checkpoint,
            "_close",
            lambda path: (held.set(), may_close.wait(60), close(path)),
        )
        checkpoints.save(2, one_device, 0)
        assert held.wait(60)
        killed_here = shutil.copytree(tmp_path, tmp_path / "as killed")
        may_close.set()
    assert on_disk(tmp_path) == [2]
    said = []
    assert newest_intact(killed_here, said.append) == 1
    assert len(said) == 1 and "never finished" in said[0]


def test_of_the_unfinished_only_the_last_is_kept(tmp_path):
    """A run killed over and over does not fill the disk."""
    for step in (1, 3, 5):
        (tmp_path / str(step)).mkdir()
        assert newest_intact(tmp_path, lambda _: None) is None
        assert [path.name for path in tmp_path.iterdir()] == [f"damaged-{step}"]


def test_what_a_kill_left_half_written_is_removed(one_device, tmp_path):
    half = tmp_path / "5.orbax-checkpoint-tmp"
    (half / "params").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, one_device, 0)
    assert not half.exists() and damage(tmp_path / "5") is None


def test_a_checkpoint_that_cannot_be_written_is_one_clear_line(one_device, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(occ_jax.training.checkpoint, "_close", full)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, one_device, 0)
    with pytest.raises(UserError) as error:
        checkpoints.save(2, one_device, 0)
    assert str(error.value) == (
        f"the checkpoint {tmp_path / '1'} could not be written "
        "(OSError: [Errno 28] No space left on device)"
    )
    checkpoints.close()
    assert on_disk(tmp_path) == [1]


def test_asked_to_stop_while_the_last_checkpoint_closes_a_run_ends_with_it(tmp_path, monkeypatch):
    close = occ_jax.training.checkpoint._close

    def interrupted(path):
        if path.name == "6":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        close(path)

    monkeypatch.setattr(occ_jax.training.checkpoint, "_close", interrupted)
    train(tiny_config(tmp_path), Progress(quiet=True))
    assert damage(tmp_path / "run" / "checkpoints" / "6") is None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_libraries_are_silent_only_while_a_checkpoint_is_written(one_device, tmp_path, monkeypatch):
    close, during = occ_jax.training.checkpoint._close, []

    def observed(path):
        during.append(absl.logging.get_verbosity())
        close(path)

    monkeypatch.setattr(occ_jax.training.checkpoint, "_close", observed)
    absl.logging.set_verbosity(absl.logging.WARNING)
    hook = sys.unraisablehook
    save_params(tmp_path / "params", one_device.params)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, one_device, 0)
        checkpoints.wait()
        assert absl.logging.get_verbosity() == absl.logging.WARNING
    assert during == [absl.logging.FATAL] * 2 and sys.unraisablehook is hook


# The command line, with files of so many bytes at the most.
FULL_DISK = """
import resource, sys
from occ_jax.cli.arguments import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("largest", "options", "said"),
    [
        (300, (), "the run directory {run} cannot be written: File too large"),
        (8192, (), r"the checkpoint {warm}/reverse_digits-\S+ could not be written \("),
        (
            8192,
            ("--warm-start.steps", "0", "--run.checkpoint-every", "1"),
            "the checkpoint {run}/checkpoints/1 could not be written ",
        ),
        (
            8192,
            ("--warm-start.steps", "0", "--run.steps", "50", "--run.checkpoint-every", "50"),
            "the log of the run in {run} cannot be written: File too large",
        ),
    ],
)
def test_a_disk_that_is_full_is_one_clear_line(tmp_path, largest, options, said):
    command = ["train", str(config_file(tmp_path)), *options]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(largest), *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    pattern = said.format(run=tmp_path / "run", warm=tmp_path / "warm_starts")
    assert re.match(f"error: {pattern}", lines[-1])
    assert sum(line.startswith("error: ") for line in lines) == 1


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_any_number_of_processes_resumes_at_the_same_prompt(tmp_path, hosts):
    """Twenty prompts drawn, by however many: the next four are prompts 20 to 23."""
    config = tiny_config(tmp_path)
    prompts = training_prompts(config, DIGITS).prompts
    expected = {prompts[index].example.prompt for index in range(20, 24)}
    found = []
    for host in range(hosts):
        share = iterate(prompts, 4 // hosts, process=host, num_processes=hosts)
        skip_to(share, 20 // hosts)
        found += [prompt.example.prompt for prompt in next(share)]
        assert prompts_read(share) == 24 // hosts
    assert len(found) == 4 and set(found) == expected
