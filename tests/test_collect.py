"""One step's experience: dynamic sampling draws until enough groups tell right from wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ_jax.training.experience
from occ_jax.config import AlgorithmConfig, MeshConfig, RewardConfig, WarmStartConfig
from occ_jax.errors import UserError
from occ_jax.files import read_rows
from occ_jax.parallel.sharding import make_mesh
from occ_jax.programs import make_programs
from occ_jax.progress import Progress
from occ_jax.training.loop import train
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

    monkeypatch.setattr(occ_jax.training.experience, "judge_completions", judge)
    train(dynamic(tmp_path), Progress(quiet=True))
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert len(drawn) == 2
    assert row["train/num_gen_batches"] == 2
    assert row["critic/frac_reward_zero_std"] == 0.5  # dropped groups included
    assert row["critic/score/mean"] == 0.25  # one completion in four of every group that was kept
    samples = read_rows(tmp_path / "run" / "samples.jsonl")
    assert [sample["prompt"] for sample in samples] == [drawn[0][1], drawn[0][3]]


def test_too_few_such_groups_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(
        occ_jax.training.experience, "judge_completions", verifier_saying(all_wrong)
    )
    with pytest.raises(UserError, match=r"kept 0 of 4 groups after rollout\.max_rounds=3"):
        train(dynamic(tmp_path, max_rounds=3), Progress(quiet=True))


def test_a_run_goes_on_from_where_its_cap_stopped_it(tmp_path, monkeypatch):
    """Step 3 finds too few groups; what was learnt before is kept, and a higher cap goes on."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    calls = []

    def judge(*arguments):
        calls.append(0)
        scores_of = every_second_group if len(calls) not in lean else all_wrong
        return verifier_saying(scores_of)(*arguments)

    def run(directory, **rollout):
        calls.clear()
        config = dynamic(directory, **rollout)
        run = dataclasses.replace(config.run, steps=4, checkpoint_every=4, evaluate_every=4)
        train(dataclasses.replace(config, run=run), Progress(quiet=True))

    monkeypatch.setattr(occ_jax.training.experience, "judge_completions", judge)
    lean = {5, 6}  # calls: two a step, and two more for the third
    run(whole, max_rounds=4)
    with pytest.raises(UserError, match=r"goes on from here with a higher --rollout\.max-rounds"):
        run(stopped, max_rounds=3)
    lean = {1, 2}
    run(stopped, max_rounds=4)
    one, other = (read_rows(path / "run" / "metrics.jsonl") for path in (whole, stopped))
    assert [row["train/num_gen_batches"] for row in one[1:]] == [2, 2, 4, 2]
    for before, after in zip(one, other, strict=True):
        for name, value in before.items():
            if not name.startswith(("timing_s/", "perf/")):
                assert value == after[name], name


def test_a_wrong_answers_reward_is_the_configs(tmp_path, monkeypatch):
    """DAPO's -1: the verifier says 0 to three in four, advantages and metrics see -1."""
    judge = verifier_saying(every_second_group)
    monkeypatch.setattr(occ_jax.training.experience, "judge_completions", judge)
    train(
        dataclasses.replace(dynamic(tmp_path), reward=RewardConfig(wrong=-1.0)),
        Progress(quiet=True),
    )
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (row["critic/score/mean"], row["critic/rewards/mean"]) == (0.25, -0.5)


def test_old_log_probs_are_the_same_in_micro_batches(tmp_path):
    config = tiny_config(tmp_path)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, old_log_probs="trainer", sampling_chunks=2),
    )
    mesh = make_mesh(config.mesh)
    programs = make_programs(config, mesh, (1,), 0)
    params = programs.model.init(jax.random.key(0))
    prompts, rows = jnp.tile(jnp.array([[2, 3, 4]]), (4, 1)), 16
    rollout = programs.sample(params, prompts, jnp.ones((4, 3), bool), jax.random.key(0))
    rewards = jnp.arange(rows, dtype=jnp.float32).reshape(4, 4)
    whole, pieces = (
        make_programs(
            dataclasses.replace(
                config, algorithm=AlgorithmConfig(updates_per_rollout=2, micro_batches=count)
            ),
            mesh,
            (1,),
            0,
        ).split(params, None, rollout, rewards)
        for count in (1, 2)
    )
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    # The sampler's own, where rows go on.
    mask = np.asarray(rollout.response_mask)
    old = np.concatenate([batch.old_log_probs for batch in pieces])
    np.testing.assert_allclose(old[mask], rollout.log_probs[mask], rtol=1e-4, atol=1e-4)
    assert pieces[0].old_auxiliary_log_probs.shape == (1, rows // 2, 4)


def test_chunks_that_leave_a_device_without_prompts_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    rollout = dataclasses.replace(config.rollout, sampling_chunks=4)
    with pytest.raises(UserError, match=r"^rollout\.sampling_chunks is 4; it must be such that"):
        dataclasses.replace(config, rollout=rollout, mesh=MeshConfig(fsdp=2))
