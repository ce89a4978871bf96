"""One step's experience: dynamic sampling draws until enough groups tell right from wrong."""

import dataclasses

import pytest

import occ_jax.rollout.collect
from occ_jax.errors import UserError
from occ_jax.metrics import read_rows
from occ_jax.progress import Progress
from occ_jax.train import train
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


def dynamic(directory, **rollout):
    config = tiny_config(directory, steps=1)
    rollout = dataclasses.replace(config.rollout, dynamic_sampling=True, **rollout)
    return dataclasses.replace(config, rollout=rollout)


def test_groups_that_score_alike_are_drawn_again(tmp_path, monkeypatch):
    """Of every rollout's four groups the first and third are all wrong: two rollouts are needed."""
    drawn = []

    def half(config, tokenizer, examples, completions):
        scores = 0.0 * completions[:, :, 0]
        scores[1::2, 0] = 1.0
        drawn.append([example.prompt for example in examples])
        return scores

    monkeypatch.setattr(occ_jax.rollout.collect, "exact_match", half)
    monkeypatch.setattr("occ_jax.evaluate.exact_match", lambda *a: 0.0 * a[3][:, :, 0])
    train(dynamic(tmp_path), Progress(quiet=True))
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert len(drawn) == 2
    assert row["critic/score/mean"] == 0.25  # one completion in four of every group that was kept
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [sample["prompt"] for sample in samples] == [drawn[0][1], drawn[0][3]]


def test_too_few_such_groups_is_an_error(tmp_path, monkeypatch):
    wrong = lambda *a: 0.0 * a[3][:, :, 0]  # noqa: E731
    monkeypatch.setattr(occ_jax.rollout.collect, "exact_match", wrong)
    with pytest.raises(UserError, match=r"kept 0 of 4 groups after rollout\.max_rounds=3"):
        train(dynamic(tmp_path, max_rounds=3), Progress(quiet=True))
