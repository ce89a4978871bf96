"""The command line as a user meets it: whole commands on a tiny experiment, and mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from occ_jax.cli.arguments import main
from occ_jax.files import read_rows
from tests.tiny import config_file

ROOT = Path(__file__).parent.parent
RUNS = "from occ_jax.config import *\ndef get_config():\n    return Config(run=RunConfig("
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compilation):
    directory = tmp_path_factory.mktemp("trained")
    config = config_file(directory)
    assert main(["train", str(config)]) == 0
    return directory, config


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_run_directory_holds_what_is_promised(trained):
    run = trained[0] / "run"
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))
    assert {"config.json", "summary.json", "samples.jsonl"} <= {p.name for p in run.iterdir()}
    assert list((run / "tensorboard").glob("events*"))
    assert {p.name for p in (run / "figures").iterdir()} >= {"accuracy.png", "coefficient.png"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["4", "6"]
    assert [row["step"] for row in read_rows(run / "samples.jsonl")] == [
        step for step in range(1, 7) for _ in range(2)
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 6
    assert 0 <= summary["after"]["val/objective"] <= 1
    for name in ("occ/coefficient_1", "occ/correlation_1", "occ/penalty_1_1", "mtp/agreement_1"):
        assert name in rows[-1]


def test_a_finished_run_is_left_as_it_is(trained, capsys):
    directory, config = trained
    before = (directory / "run" / "metrics.jsonl").read_bytes()
    assert main(["train", str(config)]) == 0
    assert (directory / "run" / "metrics.jsonl").read_bytes() == before


def test_more_steps_continue_a_run(tmp_path):
    config = config_file(tmp_path, steps=2)
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--run.steps", "4"]) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


def test_evaluate_and_generate_a_checkpoint(trained, capsys, tmp_path):
    directory, config = trained
    for checkpoint in (directory / "run", directory / "run" / "checkpoints" / "4"):
        command = ["evaluate", str(config), "--checkpoint", str(checkpoint)]
        assert main([*command, "--prompts", "8", "--samples", "2"]) == 0
    for step in ("6", "4"):
        figures = json.loads((directory / f"run/evaluations/{step}/summary.json").read_text())
        assert 0 <= figures["sets"]["reverse_digits"]["avg@2"]["mean"] <= 1
    capsys.readouterr()
    command = ["generate", str(config), "--checkpoint", str(directory / "run")]
    assert main([*command, "--prompt", "12=", "--prompt", "7="]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["12", "7"]


def test_a_comparison_ends_where_a_run_was_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("occ_jax.training.compare.train", lambda config, progress: {"step": 3})
    assert main(["compare", str(config_file(tmp_path)), "--seeds", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: stopped at step 3 of detach seed 0; start again to go on"
    )
    assert not (tmp_path / "run-compare" / "table.md").exists()


def test_a_kill_while_the_first_file_is_written_leaves_a_directory_to_begin_in(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.partial").write_text('{"algor')
    assert main(["train", str(config_file(tmp_path, steps=1))]) == 0


def test_a_finished_run_without_its_metrics_is_one_clear_line(tmp_path, capsys):
    config = config_file(tmp_path, steps=1)
    assert main(["train", str(config)]) == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["train", str(config)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "metrics.jsonl holds no evaluation of this run" in last


def test_compare_prints_every_regime(tmp_path, capsys):
    config = config_file(tmp_path, steps=3)
    assert main(["compare", str(config), "--seeds", "2", "--exact"]) == 0
    out = capsys.readouterr().out
    for name in ("detach", "ce", "policy", "occ/log_prob", "occ/cross_batch", "occ/exact"):
        assert f"| {name} " in out
    root = tmp_path / "run-compare"
    assert len(list(root.glob("*/seed*/summary.json"))) == 12
    assert {p.name for p in (root / "figures").iterdir()} == {
        "accuracy.png",
        "agreement.png",
        "coefficient.png",
        "correlation.png",
    }
    starts = {
        json.loads(path.read_text())["before"]["val/objective"]
        for path in root.glob("*/seed*/summary.json")
    }
    assert len(starts) == 1, "all runs start from one policy"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:", ", line 1: invalid syntax"),
        (
            "import nowhere_at_all",
            ", line 1: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        (
            RUNS + "stepz=3))",
            "unexpected keyword argument 'stepz'",
        ),
    ],
)
def test_a_mistake_in_a_config_file_gets_one_line(tmp_path, capsys, text, said):
    path = tmp_path / "config.py"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    assert error.startswith(f"error: {path}, line ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "{config}", "--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["train", "{config}", "--optimizer.learning-rate", "fast"], "could not convert"),
        (["train", "{config}", "--mtp.regime", "joint"], "'policy', 'occ'"),
        (["train", "{config}", "--mtp.bounds", "1", "0"], "mtp.bounds is (1.0, 0.0)"),
        (["train", "{config}", "--rollout.num-prompts", "5"], "multiple of algorithm.updates"),
        (["train", "{config}", "--mesh.data", "3"], "rollout.num_prompts"),
        (["train", "{config}", "--mesh.fsdp", "4", "--mesh.data", "4"], "rollout.num_prompts"),
        (["train", "{config}", "--model.vocab-size", "8"], "needs at least 16"),
        (["train", "{config}", "--rollout.max-new-tokens", "2"], "needs at least 3"),
        (["train", "{config}", "--model.num-mtp-modules", "7"], "enough for 2"),
        (["train", "{config}", "--mtp.estimator", "cross_batch"], "2 or more"),
        (["train", "{config}", "--optimizer.learning-rate", "2e-3"], "another config"),
        (["train", "{config}", "--run.directory", "{file}/run"], "cannot be written"),
        (["train", "{config}", "--run.directory", "{root}"], "holds no run"),
        (["train", "{root}/none.py"], "no config file"),
        (["train", "{file}"], "get_config"),
        (["evaluate", "{config}"], "--checkpoint"),
        (["evaluate", "{config}", "--checkpoint", "{root}/none"], "no complete checkpoint at"),
        (
            ["evaluate", "{config}", "--checkpoint", "{root}/run", "--model.hidden-size", "32"],
            "another model: model.hidden_size is 16 in its run and 32 in the config",
        ),
        (["generate", "{config}", "--checkpoint", "{root}/run", "--prompt", "a="], "alphabet"),
        (["generate", "{config}", "--checkpoint", "{root}/run", "--prompt", ""], "empty"),
        (["compare", "{config}", "--seeds", "0"], "positive whole number"),
        (["convince", "{config}"], "invalid choice"),
        (
            ["evaluate", "{config}", "--checkpoint", "{root}/run", "--sample", "3"],
            "unknown option --sample; did you mean --samples?",
        ),
        (["train", "{config}", "--steps", "3"], "unknown option --steps; "),
        (
            ["generate", "{config}", "--checkpoint", "{root}/run", "--temperature", "nan"],
            "--temperature is nan",
        ),
        (["compare-evaluations", "a", "b", "--ou", "c"], "unknown argument --ou"),
    ],
)
def test_a_mistake_gets_one_line_and_changes_nothing(trained, capsys, arguments, said):
    directory, config = trained
    file = directory / "file.py"
    file.write_text("x = 1\n")
    before = snapshot(directory)
    names = {"config": config, "root": directory, "file": file}
    assert main([argument.format(**names) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert snapshot(directory) == before


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, capsys):
    config = config_file(tmp_path, steps=2)
    assert main(["train", str(config)]) == 0
    step = tmp_path / "run" / "checkpoints" / "2"
    for path in (step / "params").rglob("*"):
        if path.is_file() and path.stat().st_size > 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main(["train", str(config), "--run.steps", "4"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"error: the checkpoint {step} is damaged: params/")
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if "config.json" not in k} == {
        k: v for k, v in before.items() if "config.json" not in k
    }


def test_an_empty_command_line_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "run.py", "train", "nowhere.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: no config file nowhere.py\n",
    )


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(tmp_path):
    config = config_file(tmp_path, steps=100_000, checkpoint_every=100_000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "run.py", "train", str(config)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("occ "):  # the first step is done
            break
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0
    assert "start again to go on" in errors
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == [rows[-1]["step"]]
