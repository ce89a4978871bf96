"""Metrics: every logged name is documented and the other way round; time told apart; charts."""

import dataclasses
import re
import types
from pathlib import Path

import pytest

import occ_jax.rollout.collect
import occ_jax.train
from occ_jax.cli import main
from occ_jax.config import (
    AlgorithmConfig,
    DatasetConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    WarmStartConfig,
)
from occ_jax.errors import UserError
from occ_jax.metrics import read_rows
from occ_jax.progress import Progress
from occ_jax.train import train
from tests.published_files import json_lines
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
pytestmark = pytest.mark.usefixtures("quick_compilation")


def documented() -> dict[str, re.Pattern[str]]:
    """Names of the tables of docs/metrics.md, and what they match."""
    names = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    found = {}
    for name in names:
        pattern = re.escape(name)
        for place in (r"\{k\}", r"\{n\}"):
            pattern = pattern.replace(place, r"\d+")
        if name.startswith("val/") and name != "val/accuracy":
            pattern = pattern.replace("val/", "val/(?:[a-z0-9_]+/)?", 1)
        found[name] = re.compile(pattern)
    assert len(names) == len(found), "a name is in the document twice"
    return found


def everything(directory: Path):
    """A digit task with every part that logs something of its own."""
    config = tiny_config(directory, steps=1, evaluate_every=1)
    return dataclasses.replace(
        config,
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
    config = tiny_config(directory, steps=1, evaluate_every=1)
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
    )


@pytest.fixture(scope="module")
def logged(tmp_path_factory, quick_compilation):
    """Every name that runs log, and the rows."""
    rows = []
    for make in (everything, prepared):
        directory = tmp_path_factory.mktemp(make.__name__)
        train(make(directory), Progress(quiet=True))
        rows += read_rows(directory / "run" / "metrics.jsonl")
    return {name for row in rows for name in row} - {"step", "per_update"}, rows


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


def test_dynamic_sampling_counts_what_it_drops(tmp_path, monkeypatch):
    """Groups 0, 2, 4... of every rollout score alike: half are dropped, two rollouts are needed."""

    def half(config, tokenizer, examples, completions):
        scores = 0.0 * completions[:, :, 0]
        scores[1::2, 0] = 1.0
        return scores

    monkeypatch.setattr(occ_jax.rollout.collect, "exact_match", half)
    config = tiny_config(tmp_path, steps=1)
    rollout = dataclasses.replace(config.rollout, dynamic_sampling=True)
    train(dataclasses.replace(config, rollout=rollout), Progress(quiet=True))
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["train/num_gen_batches"] == 2
    assert row["critic/frac_reward_zero_std"] == 0.5
    assert row["critic/score/mean"] == 0.25  # of the groups kept, one completion in four


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

    for module in (occ_jax.train, occ_jax.rollout.collect):
        monkeypatch.setattr(module, "time", clock)
    slowed(occ_jax.rollout.collect, "exact_match", 10.0)
    slowed(occ_jax.train, "_update", 100.0)
    slowed(occ_jax.train, "_evaluate", 1000.0)
    # Step 1 is fetched during the next rollout, 2 after an evaluation, 3 before a checkpoint.
    train(
        tiny_config(tmp_path, steps=4, evaluate_every=2, checkpoint_every=3), Progress(quiet=True)
    )
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
def alone(monkeypatch):
    """No account, no server, none of the user's settings."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


class Said(Progress):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def charts(directory):
    """Run id and logged (step, λ) of every offline part, in order."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    found = []
    for path in sorted((directory / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        store, points, run_id = DataStore(), [], ""
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
                points.append((int(items["_step"]), items.get("actor/lr")))
        found.append((run_id, points))
    return found


def test_charts_go_on_after_a_resume(tmp_path, alone):
    said = Said()
    for steps in (2, 4):
        train(tiny_config(tmp_path, steps=steps, wandb_project="tiny"), said)
    assert [line for line in said.lines if "wandb sync" in line] == [
        f"Weights & Biases: offline; to upload, wandb sync {tmp_path}/run/wandb/offline-run-*"
    ] * 2
    (first, before), (second, after) = charts(tmp_path)
    assert first == second != ""
    assert [step for step, _ in before] == [0, 1, 2]
    assert [step for step, _ in after] == [3, 4]
    assert {float(rate) for _, rate in before[1:] + after} == {pytest.approx(3e-4)}


def test_a_server_out_of_reach_is_said_and_written_around(tmp_path, alone, monkeypatch):
    """Not logged in: the quickest way not to get through."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    said = Said()
    train(tiny_config(tmp_path, steps=1, wandb_project="tiny"), said)
    assert any("it cannot be reached (" in line for line in said.lines)
    ((_, points),) = charts(tmp_path)
    assert [step for step, _ in points] == [0, 1]


@pytest.mark.parametrize(
    ("mode", "missing", "said"),
    [("nearby", False, "WANDB_MODE is 'nearby'"), ("", True, r"pip install 'occ_jax\[wandb\]'")],
)
def test_charts_that_cannot_be_are_refused_first(tmp_path, monkeypatch, mode, missing, said):
    monkeypatch.setenv("WANDB_MODE", mode)
    if missing:  # as in a directory that holds wandb's output: a package of nothing
        monkeypatch.setitem(__import__("sys").modules, "wandb", types.ModuleType("wandb"))
        monkeypatch.delitem(__import__("sys").modules, "wandb.errors", raising=False)
    with pytest.raises(UserError, match=said):
        train(tiny_config(tmp_path, wandb_project="tiny"), Progress(quiet=True))
    assert not (tmp_path / "run").exists()


def test_trouble_with_charts_does_not_end_training(tmp_path, alone, monkeypatch):
    import wandb

    def fail(*_, **__):
        raise BrokenPipeError("the service has died")

    monkeypatch.setattr(wandb.Run, "log", fail)
    said = Said()
    train(tiny_config(tmp_path, steps=2, wandb_project="tiny"), said)
    assert [line for line in said.lines if "no more charts" in line] == [
        "Weights & Biases: no more charts (the service has died)"
    ]
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 3
