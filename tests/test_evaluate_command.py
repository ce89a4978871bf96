"""`evaluate` and `compare-evaluations` as a user types them, on the smallest experiment."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from occ_jax.cli.arguments import main
from occ_jax.config import Config, MeshConfig, RolloutConfig
from occ_jax.evaluation.evaluate import call_of
from occ_jax.evaluation.records import read_records
from tests.tiny import config_file

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick_compilation):
    """A config and a run with checkpoints 4 and 6."""
    directory = tmp_path_factory.mktemp("trained")
    config = config_file(directory)
    assert main(["train", str(config)]) == 0
    return config, directory / "run"


def evaluate(trained, output, *rest, step=6, prompts=40):
    config, run = trained
    checkpoint = str(run / "checkpoints" / str(step))
    command = ["evaluate", str(config), "--checkpoint", checkpoint, "--output", str(output)]
    return main([*command, "--prompts", str(prompts), "--samples", "4", *rest])


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_evaluation_prints_and_keeps_its_figures(trained, tmp_path, capsys):
    assert evaluate(trained, tmp_path, "--k", "1", "4") == 0
    out = capsys.readouterr().out
    header, rule, row = (line.split("|")[1:-1] for line in out.splitlines()[:3])
    names = [name.strip() for name in header]
    assert names[:7] == ["set", "questions", "avg@4", "pass@1", "pass@4", "maj@1", "maj@4"]
    assert {"objective", "agreement", "tokens", "truncated"} <= set(names)
    assert row[0].strip() == "reverse_digits" and row[1].strip() == "40"
    assert all(set(part.strip()) <= set("-:") for part in rule)
    assert set(contents(tmp_path)) == {"reverse_digits.jsonl", "summary.json", "summary.md"}
    assert "\n".join(out.splitlines()[:3]) in (tmp_path / "summary.md").read_text()
    figures = json.loads((tmp_path / "summary.json").read_text())["sets"]["reverse_digits"]
    _, records = read_records(tmp_path / "reverse_digits.jsonl")
    mean = sum(sum(record.scores) for record in records) / 160
    assert figures["avg@4"]["mean"] == pytest.approx(mean)
    # One vote each: the majority of one is the average.
    assert figures["maj@1"]["mean"] == pytest.approx(mean)
    assert figures["pass@1"]["mean"] == pytest.approx(mean)
    assert figures["pass@4"]["mean"] >= figures["maj@4"]["mean"]
    for record in records:
        assert len(record.scores) == len(record.given) == len(record.lengths) == 4
        for score, given, truncated in zip(
            record.scores, record.given, record.truncated, strict=True
        ):
            assert score == (given == record.answer) and (given is None) == truncated
        assert 0 <= record.figures["objective"] <= 1
        assert record.figures["agreed_1"] <= record.figures["drafted_1"]
        assert record.completions is None


def test_answers_do_not_depend_on_how_many_places_share_a_question(trained, tmp_path):
    # 16 rows at once are 2 questions of 8 answers: on a mesh of 4 places, 2 copies of each.
    found = {}
    for places in (1, 4):
        mesh = ("--samples", "8", "--mesh.data", str(places))
        assert evaluate(trained, tmp_path / str(places), *mesh, prompts=5) == 0
        _, found[places] = read_records(tmp_path / str(places) / "reverse_digits.jsonl")
    for one, spread in zip(found[1], found[4], strict=True):
        assert spread.figures == pytest.approx(one.figures, rel=1e-5)
        assert spread._replace(figures={}) == one._replace(figures={})
    assert len({text for record in found[1] for text in record.given}) > 5


@pytest.mark.parametrize(
    ("rows", "samples", "places", "wanted"),
    [
        (512, 32, 32, (16, 2)),
        (512, 32, 8, (16, 1)),
        (512, 4, 32, (128, 1)),
        (512, 3, 32, (160, 1)),
        (64, 32, 32, (2, 16)),
        (16, 32, 1, (1, 1)),
        (64, 3, 32, (32, 1)),  # 96 rows: three answers have no two copies to lie with
    ],
)
def test_an_evaluation_samples_as_many_rows_as_a_rollout(rows, samples, places, wanted):
    config = Config(
        rollout=RolloutConfig(num_prompts=rows, group_size=2, sampling_chunks=2),
        mesh=MeshConfig(data=places),
    )
    assert call_of(config, samples) == wanted


def test_completions_are_kept_where_they_are_asked_for(trained, tmp_path):
    assert evaluate(trained, tmp_path, "--completions", prompts=2) == 0
    _, records = read_records(tmp_path / "reverse_digits.jsonl")
    for record in records:
        pairs = zip(record.truncated, record.completions, strict=True)
        assert record.given == [None if cut else text for cut, text in pairs]


def test_a_finished_evaluation_is_only_reported(trained, tmp_path):
    assert evaluate(trained, tmp_path) == 0
    before = contents(tmp_path)
    started = time.monotonic()
    assert evaluate(trained, tmp_path) == 0
    assert contents(tmp_path) == before
    assert time.monotonic() - started < 60


def test_records_of_another_checkpoint_are_refused_and_left_alone(trained, tmp_path, capsys):
    assert evaluate(trained, tmp_path, prompts=4) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    for changed in (
        {"step": 4},
        {"prompts": 5},
        {"rest": ["--rollout.temperature", "0.5"]},
        {"rest": ["--run.seed", "1"]},
        {"rest": ["--reward.verifier", "last_step"]},
        {"rest": ["--completions"]},
    ):
        rest = changed.pop("rest", [])
        assert evaluate(trained, tmp_path, *rest, **{"prompts": 4, **changed}) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.splitlines()[-1].startswith("error: ")
        assert "holds the records of another evaluation" in captured.err
    assert contents(tmp_path) == before


def test_an_evaluation_that_was_killed_goes_on(trained, tmp_path):
    assert evaluate(trained, tmp_path / "whole", prompts=200) == 0
    config, run = trained
    command = [sys.executable, "run.py", "evaluate", str(config), "--checkpoint", str(run)]
    command += ["--prompts", "200", "--samples", "4", "--output", str(tmp_path / "killed")]
    # Compiled as this process compiles, or digits of the objective differ.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    records = tmp_path / "killed" / "reverse_digits.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if records.exists() and records.read_bytes().count(b"\n") > 8:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert records.read_bytes().count(b"\n") > 8, "the header and some questions"
    # Such as a kill in the middle of a line leaves it.
    records.write_bytes(records.read_bytes()[:-20])
    assert evaluate(trained, tmp_path / "killed", prompts=200) == 0
    assert records.read_bytes() == (tmp_path / "whole" / "reverse_digits.jsonl").read_bytes()


def test_two_checkpoints_are_compared(trained, tmp_path, capsys):
    assert evaluate(trained, tmp_path / "a", step=4) == 0
    assert evaluate(trained, tmp_path / "b", step=6) == 0
    capsys.readouterr()
    command = ["compare-evaluations", str(tmp_path / "a"), str(tmp_path / "b"), "--k", "2"]
    assert main([*command, "--output", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| reverse")]
    assert [row[1].strip() for row in rows] == ["avg", "pass@2", "maj@2", "objective"]
    for row in rows:
        assert re.fullmatch(r"[+-]\d+\.\d ± \d+\.\d\*?", row[5].strip())
        assert sum(map(int, row[6].split("/"))) == 40
    figures = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert figures["settings"] == {}
    assert set(contents(tmp_path / "c")) == {"comparison.json", "comparison.md"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "5"], "--k is 5; it must be at most the 4 answers a question has"),
        (["--k", "0"], "no positive whole number"),
        (["--samples", "1001", "--k", "8"], "--k is 8 of 1,001 samples a question"),
        (["--output", "{file}/out"], "cannot be written"),
        (["--reward.per-source", "aime24", "math_verify"], "this config has reverse_digits"),
        (["--reward.verifier", "nowhere:score"], "nowhere:score cannot be imported"),
    ],
)
def test_mistakes_get_one_line(trained, tmp_path, capsys, arguments, said):
    (tmp_path / "file").write_text("")
    rest = [argument.format(file=tmp_path / "file") for argument in arguments]
    assert evaluate(trained, tmp_path / "out", *rest, prompts=2) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and said in captured.err
    assert not (tmp_path / "out").exists()


def test_evaluations_that_cannot_be_compared_get_one_line(tmp_path, capsys):
    assert main(["compare-evaluations", str(tmp_path), str(tmp_path)]) == 2
    assert "holds no records of an evaluation" in capsys.readouterr().err
    assert main(["compare-evaluations", str(tmp_path)]) == 2
    assert "required: B" in capsys.readouterr().err
