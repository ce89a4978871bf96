"""A run killed at any moment and started again ends bit for bit where an undisturbed one does."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from occ_jax import checkpoint
from occ_jax.config import computation, to_dict
from occ_jax.data.pipeline import iterate, training_prompts
from occ_jax.data.tokenizer import DIGITS
from occ_jax.files import write_json
from occ_jax.metrics import read_rows
from occ_jax.models import Model
from occ_jax.progress import Progress
from occ_jax.rl.train_step import abstract_state
from occ_jax.sharding import make_mesh
from occ_jax.train import train
from tests.tiny import config_file, tiny_config

ROOT = Path(__file__).parent.parent
STEPS = 12
pytestmark = pytest.mark.usefixtures("quick_compilation")


def final_state(directory: Path):
    config = tiny_config(directory, steps=STEPS)
    mesh, model = make_mesh(config.mesh), Model(config.model)
    manager = checkpoint.open_manager(directory / "run" / "checkpoints", 2)
    data = iterate(training_prompts(config, DIGITS).prompts, config.rollout.num_prompts)
    like = abstract_state(model, computation(config), mesh)
    state = checkpoint.restore(manager, STEPS, like, data)
    manager.close()
    return state._replace(key=jax.random.key_data(state.key)), data.get_state()


def logged(directory: Path):
    """Rows without what depends on the clock."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("timing_s", "perf"))}
        for row in read_rows(directory / "run" / "metrics.jsonl")
    ]


def assert_same_run(one: Path, other: Path):
    (state, data), (other_state, other_data) = final_state(one), final_state(other)
    jax.tree.map(np.testing.assert_array_equal, state, other_state)
    assert data == other_data
    assert logged(one) == logged(other)
    samples = [read_rows(path / "run" / "samples.jsonl") for path in (one, other)]
    assert samples[0] == samples[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, quick_compilation):
    directory = tmp_path_factory.mktemp("undisturbed")
    train(tiny_config(directory, steps=STEPS), Progress(quiet=True))
    return directory


def test_the_same_seed_gives_the_same_run(undisturbed, tmp_path):
    train(tiny_config(tmp_path, steps=STEPS), Progress(quiet=True))
    assert_same_run(undisturbed, tmp_path)


def test_stopped_between_checkpoints_and_resumed(undisturbed, tmp_path):
    """Longer run of fewer steps first: steps=7 ends on a checkpoint of its own."""
    train(tiny_config(tmp_path, steps=7, evaluate_every=3), Progress(quiet=True))
    # The last step of a run is evaluated too; drop what the undisturbed run does not have.
    train(tiny_config(tmp_path, steps=STEPS), Progress(quiet=True))
    ours = [row for row in logged(tmp_path) if row["step"] != 7]
    theirs = [row for row in logged(undisturbed) if row["step"] != 7]
    assert ours == theirs
    state, other = final_state(tmp_path), final_state(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, state[0], other[0])
    assert state[1] == other[1]


@pytest.mark.parametrize("harm", ["flipped bit", "cut short", "never finished"])
def test_a_damaged_checkpoint_is_passed_over(undisturbed, tmp_path, harm):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    config = tiny_config(tmp_path, steps=STEPS)
    write_json(tmp_path / "run" / "config.json", to_dict(config))
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    if harm == "never finished":
        (newest / "manifest.json").unlink()
    else:
        largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 4
        largest.write_bytes(content if harm == "flipped bit" else content[:-1])
    train(config, Progress(quiet=True))
    assert_same_run(undisturbed, tmp_path)
    assert (newest.parent / f"damaged-{STEPS}").is_dir()


def wait_for(moment: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and not moment():
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_several_moments_and_resumed(undisturbed, tmp_path):
    config = config_file(tmp_path, steps=STEPS)
    steps = tmp_path / "run" / "checkpoints"

    def exists(step: int) -> Callable[[], bool]:
        return lambda: (steps / str(step)).exists()

    def being_written(step: int) -> Callable[[], bool]:
        """Orbax's temporary directory, whose name starts with the step's."""
        return lambda: any(p.name != str(step) for p in steps.glob(f"{step}*"))

    def soon_after(moment: Callable[[], bool], seconds: float) -> Callable[[], bool]:
        def check() -> bool:
            if not moment():
                return False
            time.sleep(seconds)
            return True

        return check

    moments = [
        lambda: (tmp_path / "run" / "config.json").exists(),  # before the first step
        exists(2),  # right after a checkpoint
        being_written(4),  # in the middle of a save
        soon_after(exists(6), 0.05),  # between checkpoints
    ]
    # As `quick_compilation`: bits agree between processes that compile alike.
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    killed = 0
    for moment in [*moments, lambda: False]:
        process = subprocess.Popen(
            [sys.executable, "run.py", "train", str(config)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(moment, process)
        killed += process.poll() is None
        process.kill()
        code = process.wait()
    assert code == 0, "the last one was left alone"
    assert killed == len(moments)
    assert_same_run(undisturbed, tmp_path)
