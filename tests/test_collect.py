"""One step's experience: dynamic sampling draws until enough groups tell right from wrong."""

import dataclasses

import pytest

import occ_jax.rollout.collect
from occ_jax.config import RewardConfig, WarmStartConfig
from occ_jax.errors import UserError
from occ_jax.metrics import read_rows
from occ_jax.progress import Progress
from occ_jax.train import train
from tests.tiny import tiny_config, verifier_saying

pytestmark = pytest.mark.usefixtures("quick_compilation")


def dynamic(directory, **rollout):
    config = tiny_config(directory, steps=1)
    rollout = dataclasses.replace(config.rollout, dynamic_sampling=True, **rollout)
    return dataclasses.replace(config, rollout=rollout, warm_start=WarmStartConfig(steps=0))


def all_wrong(completions):
    return 0.0 * completions[:, :, 0]


def every_second_group(completions):
    """One completion in four is right in every second group."""
    scores = all_wrong(completions)
    scores[1::2, 0] = 1.0
    return scores


def test_groups_that_score_alike_are_drawn_again(tmp_path, monkeypatch):
    """Of every rollout's four groups the first and third are all wrong: two rollouts are needed."""
    drawn = []

    def judge(pool, config, tokenizer, examples, completions):
        drawn.append([example.prompt for example in examples])
        return verifier_saying(every_second_group)(pool, config, tokenizer, examples, completions)

    monkeypatch.setattr(occ_jax.rollout.collect, "judge_completions", judge)
    train(dynamic(tmp_path), Progress(quiet=True))
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert len(drawn) == 2
    assert row["train/num_gen_batches"] == 2
    assert row["critic/frac_reward_zero_std"] == 0.5  # dropped groups included
    assert row["critic/score/mean"] == 0.25  # one completion in four of every group that was kept
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [sample["prompt"] for sample in samples] == [drawn[0][1], drawn[0][3]]


def test_too_few_such_groups_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(occ_jax.rollout.collect, "judge_completions", verifier_saying(all_wrong))
    with pytest.raises(UserError, match=r"kept 0 of 4 groups after rollout\.max_rounds=3"):
        train(dynamic(tmp_path, max_rounds=3), Progress(quiet=True))


def test_a_wrong_answers_reward_is_the_configs(tmp_path, monkeypatch):
    """DAPO's -1: the verifier says 0 to three in four, advantages and metrics see -1."""
    judge = verifier_saying(every_second_group)
    monkeypatch.setattr(occ_jax.rollout.collect, "judge_completions", judge)
    train(
        dataclasses.replace(dynamic(tmp_path), reward=RewardConfig(wrong=-1.0)),
        Progress(quiet=True),
    )
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (row["critic/score/mean"], row["critic/rewards/mean"]) == (0.25, -0.5)
