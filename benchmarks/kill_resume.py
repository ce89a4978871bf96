"""Kills a run again and again, and damages its checkpoints: nothing may be lost, nothing believed.

    python benchmarks/kill_resume.py [--kills 50] [--seed 0] [--json]

A small run (reverse two digits; the config is `get_config` below, so this file is its CONFIG) is
trained once undisturbed and once killed by SIGKILL at random moments, each time started again from
what is on disk: while it starts, while a checkpoint is being written, and in between. Afterwards
parameters, optimizer state, metrics and samples must be the same to the bit. Then every file of the
last checkpoint is cut short and has a bit flipped, one at a time: each must be noticed by name, and
the run must go back to the checkpoint before. The processes share a compilation cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from occ_jax.config import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WarmStartConfig,
)

_ROOT = Path(__file__).resolve().parent.parent
_STEPS_A_KILL = 2  # more than a life completes on average, by its four ways to end
_SECONDS_AFTER = {"start": 6.0, "save": 0.1, "manifest": 0.0, "step": 0.3}
_PATIENCE_S = 1800.0


def get_config() -> Config:
    """The run: a checkpoint every step, an evaluation every seventh."""
    return Config(
        task=TaskConfig(name="reverse_digits", digits=2),
        model=ModelConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=32,
        ),
        warm_start=WarmStartConfig(steps=20, batch_size=32),
        rollout=RolloutConfig(num_prompts=4, group_size=4, max_new_tokens=4),
        reward=RewardConfig(workers=1),
        algorithm=AlgorithmConfig(updates_per_rollout=2),
        run=RunConfig(
            evaluate_every=7, evaluation_prompts=8, evaluation_samples=2, checkpoint_every=1
        ),
    )


class Campaign:
    """Two runs of one config in a scratch directory, and the ways to start them."""

    def __init__(self, scratch: Path, steps: int) -> None:
        self.scratch, self.steps = scratch, steps
        # Programs of processes that share a cache are the same to the bit.
        self._environment = {
            "JAX_PLATFORMS": "cpu",
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "MPLBACKEND": "Agg",
            "JAX_COMPILATION_CACHE_DIR": str(scratch / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, directory: Path) -> subprocess.Popen[str]:
        """A process that trains, or goes on with, the run in `directory`."""
        arguments = {
            "--run.directory": directory,
            "--run.steps": self.steps,
            "--warm-start.cache-directory": self.scratch / "warm_starts",
        }
        flat = [str(part) for pair in arguments.items() for part in pair]
        return subprocess.Popen(
            [sys.executable, "run.py", "train", __file__, *flat],
            cwd=_ROOT,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, directory: Path) -> tuple[int, str]:
        """Trains to the end; exit status and what was said."""
        process = self.start(directory)
        _, said = process.communicate(timeout=_PATIENCE_S)
        return process.returncode, said


class Kill:
    """One life of the run and how it ended."""

    def __init__(self, campaign: Campaign, directory: Path, randomly: random.Random) -> None:
        steps = directory / "checkpoints"
        before, since = newest(steps), time.time()
        # By turns: anywhere while it starts, soon after a save has begun, at once after its files
        # are there but no manifest, anywhere in the next steps.
        aim = randomly.choice(("start", "save", "manifest", "step"))
        delay = randomly.uniform(0, _SECONDS_AFTER[aim])
        started = time.monotonic()
        process = campaign.start(directory)

        def reached() -> bool:
            match aim:
                case "start":
                    return True
                case "save":
                    return len(begun(steps, since)) > 0
                case "manifest":
                    return any(name.isdigit() for name in begun(steps, since))
                case "step":
                    return newest(steps) > before

        try:
            while process.poll() is None and not reached():
                if time.monotonic() - started > _PATIENCE_S:
                    raise SystemExit(f"the run makes no progress after step {before}")
                time.sleep(0.001)
            until = time.monotonic() + delay
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.001)
            self.killed = process.poll() is None
        finally:
            process.kill()
            _, said = process.communicate()
        if not self.killed:
            raise SystemExit(f"the run ended by itself with status {process.returncode}: {said}")
        self.steps = newest(steps) - before
        self.moment = moment_of(steps, since, self.steps)


def newest(steps: Path) -> int:
    """The newest complete checkpoint; 0 for none."""
    complete = [0]
    for path in steps.iterdir() if steps.is_dir() else ():
        if path.name.isdigit() and (path / "manifest.json").exists():
            complete.append(int(path.name))
    return max(complete)


def begun(steps: Path, since: float) -> list[str]:
    """Checkpoints without a manifest that hold files written after `since`, by the wall clock."""
    found: list[str] = []
    for path in list(steps.iterdir()) if steps.is_dir() else []:
        if not path.name.split(".")[0].isdigit() or (path / "manifest.json").exists():
            continue
        with suppress(FileNotFoundError):  # renamed, or cleared away, meanwhile
            files = [file for file in path.rglob("*") if file.is_file()]
            if any(file.stat().st_mtime > since for file in files):
                found.append(path.name)
    return found


def moment_of(steps: Path, since: float, advanced: int) -> str:
    """What the process was at when it was killed, by what it has left on disk.

    Args:
        steps: of the checkpoints.
        since: when it was started.
        advanced: steps of the checkpoints that it has completed.
    """
    left = begun(steps, since)
    if any(not name.isdigit() for name in left):
        return "while a checkpoint's files were written"
    if left:
        return "after its files, before its manifest"
    return "between two saves" if advanced else "while it started, or before its first save"


def kill_and_resume(campaign: Campaign, directory: Path, kills: int, seed: int) -> Counter[str]:
    """Kills the run that often, then lets it finish; moments and how often each was hit."""
    randomly = random.Random(seed)
    moments: Counter[str] = Counter()
    for number in range(kills):
        kill = Kill(campaign, directory, randomly)
        moments[kill.moment] += 1
        print(
            f"kill {number + 1}/{kills}: {kill.moment}; {kill.steps} steps further",
            file=sys.stderr,
        )
    status, said = campaign.finish(directory)
    if status != 0:
        raise SystemExit(f"the run left alone ended with status {status}: {said}")
    return moments


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs differ in: arrays of the last checkpoint, metrics, samples."""
    import jax
    import numpy as np

    from occ_jax.files import read_rows
    from occ_jax.models import Model
    from occ_jax.parallel.sharding import make_mesh
    from occ_jax.rl.train_step import abstract_state
    from occ_jax.training.checkpoint import Checkpoints
    from occ_jax.training.run_directory import RunDirectory

    states: list[Any] = []
    logs: list[Any] = []
    for directory in (one, other):
        run = RunDirectory(directory)
        config = run.config()
        like = abstract_state(Model(config.model), config, make_mesh(config.mesh))
        with Checkpoints(run.checkpoints, keep=config.run.keep_checkpoints) as found:
            state, prompts = found.restore(found.steps()[-1], like)
        state = (state._replace(key=jax.random.key_data(state.key)), prompts)
        states.append(jax.tree_util.tree_leaves_with_path(state))
        logs.append(
            {
                f"{name} row {number}": {
                    key: value
                    for key, value in row.items()
                    if not key.startswith(("timing_s", "perf"))
                }
                for name in ("metrics", "samples")
                for number, row in enumerate(read_rows(directory / f"{name}.jsonl"))
            }
        )
    found_different = [
        jax.tree_util.keystr(path)
        for (path, a), (_, b) in zip(*states, strict=True)
        if np.asarray(a).tobytes() != np.asarray(b).tobytes()
    ]
    names = dict.fromkeys((*logs[0], *logs[1]))
    return found_different + [name for name in names if logs[0].get(name) != logs[1].get(name)]


def tamper(path: Path, how: str, randomly: random.Random) -> None:
    """Cuts a file short by a byte or flips one of its bits."""
    content = bytearray(path.read_bytes())
    if how == "cut short":
        del content[-1]
    else:
        content[randomly.randrange(len(content))] ^= 1 << randomly.randrange(8)
    path.write_bytes(content)


def damage_every_file(campaign: Campaign, run: Path, seed: int) -> dict[str, int]:
    """Damages the last checkpoint's files one at a time; how often that was noticed in full.

    Noticed in full: the integrity check names the file, the run falls back to the step before, and
    reading the parameters is refused.
    """
    from occ_jax.errors import UserError
    from occ_jax.training.checkpoint import damage, newest_intact, restore_params

    randomly = random.Random(seed)
    counts = Counter({"tried": 0, "noticed": 0})
    checkpoints = run / "checkpoints"
    last = newest(checkpoints)
    files = sorted(path for path in (checkpoints / str(last)).rglob("*") if path.is_file())
    for path in files:
        for how in ("cut short", "bit flipped"):
            if path.stat().st_size == 0:
                continue
            copy = campaign.scratch / "damaged"
            shutil.copytree(checkpoints, copy)
            inside = path.relative_to(checkpoints / str(last))
            tamper(copy / str(last) / inside, how, randomly)
            problem = damage(copy / str(last))
            try:
                restore_params(copy / str(last), {})
                refused = False
            except UserError as error:
                refused = "damaged" in str(error)
            fell_back = newest_intact(copy, lambda _: None) == last - 1
            named = problem is not None and (str(inside) in problem or inside.name in problem)
            # A manifest may have come to speak against another file.
            manifest = inside.name == "manifest.json" and problem is not None
            counts["tried"] += 1
            counts["noticed"] += refused and fell_back and (named or manifest)
            shutil.rmtree(copy)
    return dict(counts)


def damaged_runs(campaign: Campaign, run: Path, undisturbed: Path, seed: int) -> dict[str, int]:
    """Whole processes on damaged checkpoints: one goes back a step, one finds nothing to go to."""
    randomly = random.Random(seed)
    copy = campaign.scratch / "run"
    shutil.copytree(run, copy)
    steps = sorted(
        (path for path in (copy / "checkpoints").iterdir() if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    largest = [max(step.rglob("*"), key=lambda path: path.stat().st_size) for step in steps]
    tamper(largest[-1], "bit flipped", randomly)
    status, said = campaign.finish(copy)
    repeated = status == 0 and "is damaged" in said and not differences(undisturbed, copy)
    shutil.rmtree(copy)
    shutil.copytree(run, copy)
    for path in largest:
        tamper(path, "cut short", randomly)
    before = _contents(copy / "checkpoints")
    status, said = campaign.finish(copy)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    refused = status == 2 and len(lines) == 1 and "is damaged" in lines[0]
    untouched = before == _contents(copy / "checkpoints")
    shutil.rmtree(copy)
    return {"tried": 2, "noticed": int(repeated) + int(refused and untouched)}


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (50)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damages (0)")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        campaign = Campaign(Path(name), steps=_STEPS_A_KILL * options.kills)
        undisturbed, killed = campaign.scratch / "undisturbed", campaign.scratch / "killed"
        status, said = campaign.finish(undisturbed)
        if status != 0:
            raise SystemExit(f"the undisturbed run ended with status {status}: {said}")
        moments = kill_and_resume(campaign, killed, options.kills, options.seed)
        result: dict[str, Any] = {
            "kills": options.kills,
            "seed": options.seed,
            "steps": campaign.steps,
            "moments": dict(sorted(moments.items())),
            "differences": differences(undisturbed, killed),
            "damaged files": damage_every_file(campaign, killed, options.seed),
            "runs on damaged checkpoints": damaged_runs(
                campaign, killed, undisturbed, options.seed
            ),
            "seconds": round(time.monotonic() - started),
        }
    print(json.dumps(result) if options.json else table(result))
    damages = (result["damaged files"], result["runs on damaged checkpoints"])
    intact = all(found["tried"] == found["noticed"] for found in damages)
    return 0 if intact and not result["differences"] else 1


def table(result: dict[str, Any]) -> str:
    """The result for people, Markdown."""
    different = result["differences"]
    rows = [(f"killed {moment}", count) for moment, count in result["moments"].items()]
    rows += [
        ("SIGKILLs in all", result["kills"]),
        (
            "arrays, metrics rows and samples that differ from the undisturbed run",
            f"{len(different)}{': ' if different else ''}{', '.join(different[:5])}",
        ),
    ]
    for name in ("damaged files", "runs on damaged checkpoints"):
        rows.append((name, f"{result[name]['noticed']} of {result[name]['tried']} noticed"))
    lines = [f"{result['steps']} steps, {result['seconds']} s, seed {result['seed']}", ""]
    return "\n".join([*lines, "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


if __name__ == "__main__":
    sys.exit(main())
