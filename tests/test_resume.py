"""A run killed at any moment and started again ends bit for bit where an undisturbed one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from occ_jax.config import to_dict
from occ_jax.files import read_rows, write_json
from occ_jax.models import Model
from occ_jax.parallel.sharding import make_mesh
from occ_jax.progress import Progress
from occ_jax.rl.train_step import abstract_state
from occ_jax.training.checkpoint import Checkpoints
from occ_jax.training.loop import train
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
STEPS = 12
pytestmark = pytest.mark.usefixtures("quick_compilation")


def final_state(directory: Path):
    config = tiny_config(directory, steps=STEPS)
    mesh, model = make_mesh(config.mesh), Model(config.model)
    like = abstract_state(model, config, mesh)
    with Checkpoints(directory / "run" / "checkpoints", keep=2) as checkpoints:
        state, prompts_drawn = checkpoints.restore(STEPS, like)
    return state._replace(key=jax.random.key_data(state.key)), prompts_drawn


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


@pytest.mark.slow
def test_killed_at_several_moments_and_resumed():
    """The fault campaign of docs/results/faults.md, with fewer kills."""
    script = ROOT / "benchmarks" / "kill_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "5", "--seed", "1", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert sum(result["moments"].values()) == 5
    assert result["differences"] == []
    for name, fewest in (("damaged files", 40), ("runs on damaged checkpoints", 2)):
        assert result[name]["noticed"] == result[name]["tried"] >= fewest
