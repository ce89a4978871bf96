"""Metrics: every logged name is documented and the other way round; time told apart; charts."""

import dataclasses
import json
import re
import struct
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import occ_jax.training.experience
import occ_jax.training.loop
from occ_jax.cli.arguments import main
from occ_jax.config import (
    AlgorithmConfig,
    DatasetConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    RewardConfig,
    WarmStartConfig,
)
from occ_jax.errors import UserError
from occ_jax.files import read_rows
from occ_jax.progress import Progress
from occ_jax.training.charts import open_charts
from occ_jax.training.log import RunLog
from occ_jax.training.loop import Run, train
from occ_jax.training.run_directory import RunDirectory
from tests.checkpoint_files import GOLDEN
from tests.published_files import json_lines
from tests.tiny import tiny_config, verifier_saying

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")


def documented() -> dict[str, re.Pattern[str]]:
    """Names of the tables of docs/metrics.md, and what they match."""
    names = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    found = {}
    for name in names:
        pattern = re.escape(name)
        for place in (r"\{k\}", r"\{n\}"):
            pattern = pattern.replace(place, r"\d+")
        if name.startswith("val/"):
            pattern = pattern.replace("val/", "val/(?:own/)?", 1)
        found[name] = re.compile(pattern)
    assert len(names) == len(found), "a name is in the document twice"
    return found


def everything(directory: Path):
    """A digit task with every part that logs something of its own."""
    config = tiny_config(directory, steps=1, evaluate_every=1)
    return dataclasses.replace(
        config,
        warm_start=WarmStartConfig(steps=0),
        model=dataclasses.replace(
            config.model,
            num_mtp_modules=2,
            moe=MoEConfig(
                num_experts=4,
                experts_per_token=2,
                intermediate_size=8,
                shared_intermediate_size=8,
            ),
        ),
        rollout=dataclasses.replace(config.rollout, dynamic_sampling=True),
        algorithm=AlgorithmConfig(
            updates_per_rollout=2, dual_clip=3.0, kl_coefficient=0.01, entropy_coefficient=0.01
        ),
        mtp=MTPConfig(estimator="exact"),
    )


def prepared(directory: Path):
    """One step on a prepared set, that is evaluated on as well."""
    problems = [{"q": f"what is {index} + {index}?", "a": 2 * index} for index in range(4)]
    source = json_lines(directory / "own.jsonl", problems)
    columns = ["--prompt-column", "q", "--answer-column", "a"]
    data = str(directory / "data")
    command = ["prepare", "own", "--source", str(source), "--data-directory", data, *columns]
    assert main(command) == 0
    config = tiny_config(directory, steps=1, evaluate_every=1, wandb_project="tiny")
    return dataclasses.replace(
        config,
        dataset=DatasetConfig(
            name="own", evaluation=("own",), directory=data, template="{problem}"
        ),
        model=ModelConfig(
            checkpoint=str(GOLDEN / "mimo"),
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            rope_theta=640_000.0,
            rms_norm_eps=1e-5,
            qkv_bias=True,
            mtp_concat="hidden_embed",
            mtp_trunk_hidden="pre_norm",
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=dataclasses.replace(config.rollout, max_prompt_tokens=96),
        reward=RewardConfig(verifier="exact_match"),
    )


def cold(directory: Path, **run: object):
    """Without the warm-up's compilation."""
    return dataclasses.replace(tiny_config(directory, **run), warm_start=WarmStartConfig(steps=0))


@pytest.fixture(scope="module")
def logged(tmp_path_factory, quick_compilation):
    """Every name that runs log, the rows, and the config of the last run."""
    rows = []
    for make in (everything, prepared):
        config = make(tmp_path_factory.mktemp(make.__name__))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WANDB_MODE", "offline")
            if config.rollout.dynamic_sampling:  # a policy that knows nothing is right once a group
                once = lambda tokens: np.eye(1, tokens.shape[1]).repeat(len(tokens), 0)  # noqa: E731
                right = verifier_saying(once)
                patch.setattr(occ_jax.training.experience, "judge_completions", right)
            train(config, Progress(quiet=True))
        rows += read_rows(Path(config.run.directory) / "metrics.jsonl")
    return {name for row in rows for name in row} - {"step", "per_update"}, rows, config


def test_every_metric_is_documented(logged):
    patterns = documented().values()
    unknown = [name for name in sorted(logged[0]) if not any(p.fullmatch(name) for p in patterns)]
    assert not unknown


def test_every_documented_metric_exists(logged):
    missing = [
        name
        for name, pattern in documented().items()
        if not any(pattern.fullmatch(found) for found in logged[0])
    ]
    assert not missing


def test_extremes_enclose_means(logged):
    for row in logged[1]:
        for name in ("critic/score", "critic/rewards", "response_length"):
            if row["step"] > 0:
                assert row[f"{name}/min"] <= row[f"{name}/mean"] <= row[f"{name}/max"]


def test_a_steps_time_is_its_own(tmp_path, monkeypatch):
    """A clock that the verifier moves by 10, updates by 100, evaluation by 1,000 seconds."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])

    def slowed(module, name, seconds):
        function = getattr(module, name)

        def run(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, run)

    for module in (occ_jax.training.loop, occ_jax.training.experience):
        monkeypatch.setattr(module, "time", clock)

    def ten_seconds():
        now[0] += 10.0
        return 10.0

    judge = verifier_saying(lambda completions: 0.0 * completions[:, :, 0], ten_seconds)
    monkeypatch.setattr(occ_jax.training.experience, "judge_completions", judge)
    slowed(Run, "update", 100.0)
    slowed(Run, "evaluate", 1000.0)
    # Step 1 is fetched during the next rollout, 2 after an evaluation, 3 before a checkpoint.
    train(cold(tmp_path, steps=4, evaluate_every=2, checkpoint_every=3), Progress(quiet=True))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")[1:]
    assert len(rows) == 4
    for row in rows:
        assert row["timing_s/rollout"] == 0
        assert row["timing_s/reward"] == 10
        assert row["timing_s/update"] == 100
        assert row["timing_s/step"] == 110
        assert row["perf/throughput"] == row["rollout/tokens"] / 110


# Weights & Biases.


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No account, no server, none of the user's settings."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def chart_config(directory):
    (directory / "run").mkdir(exist_ok=True)
    return tiny_config(directory, wandb_project="tiny")


def write_steps(config, steps, say):
    """What a run does between its start and its end; the first of `steps` is the next one."""
    log = RunLog(RunDirectory(Path(config.run.directory)), steps[0] - 1, open_charts(config, say))
    for step in steps:
        log.write({"step": step, "actor/lr": step / 8, "per_update": {"occ/correlation_1": [1.0]}})
    log.close()


def records(data):
    """Records of a file of wandb's: a LevelDB log after a header of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def charts(config):
    """Run id and logged rows of every offline part, in order."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its process writes behind: wait for that
    found = []
    for path in sorted(Path(config.run.directory).glob("wandb/offline-run-*/run-*.wandb")):
        rows, run_id = [], ""
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            run_id = record.run.run_id or run_id
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if items:
                kept = {name for name in items if name == "_step" or not name.startswith("_")}
                rows.append({name: json.loads(items[name]) for name in kept})
        found.append((run_id, rows))
    return found


def test_charts_go_on_after_a_resume(tmp_path, alone):
    said = []
    config = chart_config(tmp_path)
    write_steps(config, [0, 1, 2], said.append)
    time.sleep(1.1)  # parts are named by the second
    write_steps(config, [2, 3], said.append)
    parts = f"{config.run.directory}/wandb/offline-run-*"
    assert said == [f"Weights & Biases: offline; to upload, wandb sync {parts}"] * 2
    (first, before), (second, after) = charts(config)
    assert first == second != ""
    assert before == [{"_step": step, "actor/lr": step / 8} for step in (0, 1, 2)]
    assert after == [{"_step": step, "actor/lr": step / 8} for step in (2, 3)]


def test_a_server_out_of_reach_is_said_and_written_around(tmp_path, alone, monkeypatch):
    """Not logged in: the quickest way not to get through."""
    monkeypatch.setenv("WANDB_MODE", "online")
    said = []
    config = chart_config(tmp_path)
    write_steps(config, [0, 1], said.append)
    assert "offline, as it cannot be reached (No API key" in said[0]
    ((_, rows),) = charts(config)
    assert [row["_step"] for row in rows] == [0, 1]


def test_disabled_charts_write_nothing(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said = []
    config = chart_config(tmp_path)
    write_steps(config, [0, 1], said.append)
    assert not said
    assert not charts(config)
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("mode", "missing", "project", "said"),
    [
        ("nearby", False, "tiny", "WANDB_MODE is 'nearby'"),
        ("", True, "tiny", r"pip install 'occ_jax\[wandb\]'"),
        ("", False, "a/b", "run.wandb_project is 'a/b'; it must have"),
    ],
)
def test_charts_that_cannot_be_are_refused_first(
    tmp_path, monkeypatch, mode, missing, project, said
):
    monkeypatch.setenv("WANDB_MODE", mode)
    if missing:  # as in a directory that holds wandb's output: a package of nothing
        monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
        monkeypatch.delitem(sys.modules, "wandb.errors", raising=False)
    with pytest.raises(UserError, match=said):
        train(tiny_config(tmp_path, wandb_project=project), Progress(quiet=True))
    assert not (tmp_path / "run").exists()


def test_trouble_with_charts_ends_the_charts_alone(tmp_path, alone, monkeypatch):
    import wandb

    def fail(*_, **__):
        raise BrokenPipeError("the service has died")

    monkeypatch.setattr(wandb.Run, "log", fail)
    said = []
    write_steps(chart_config(tmp_path), [0, 1, 2], said.append)
    assert said[1:] == ["Weights & Biases: no more charts (the service has died)"]
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_training_run_is_charted(logged):
    """The prepared one was told to be."""
    ((run_id, rows),) = charts(logged[2])
    directory = Path(logged[2].run.directory)
    assert json.loads((directory / "wandb.json").read_text()) == {"id": run_id}
    written = [
        {name: value for name, value in row.items() if name not in ("step", "per_update")}
        | {"_step": row["step"]}
        for row in read_rows(directory / "metrics.jsonl")
    ]
    assert rows == written
