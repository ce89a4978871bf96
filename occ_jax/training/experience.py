"""One step's experience: prompts -> completions -> rewards -> groups kept -> mini-batches.

The host side of a step. Rewards are computed here because verifiers are host programs in general;
everything before and after them stays on device. Each of several processes samples and judges its
block of the prompts (`occ_jax.parallel.exchange`); scores and lengths of all are gathered, so all
keep the same groups and log the same figures.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Array, Key

from occ_jax.data.examples import Prompt, prompt_text
from occ_jax.data.pipeline import pad_prompts
from occ_jax.data.tokenizer import decode_completion
from occ_jax.errors import UserError
from occ_jax.parallel.exchange import (
    fold_in,
    gather_objects,
    gather_rows,
    get_process_rows,
    process_rows,
    put_process_rows,
    put_replicated,
)
from occ_jax.rewards.judging import judge_completions
from occ_jax.rewards.pool import Judged, reward_metrics
from occ_jax.rewards.shaping import informative_groups, overlong_penalty
from occ_jax.setup import Setup
from occ_jax.types import Batch, Params, Rollout


class TooFewGroups(UserError):
    """Dynamic sampling reached its cap, on all processes alike."""


class Experience(NamedTuple):
    """The data that one step trains on, and its figures."""

    batches: list[Batch]  # updates_per_rollout mini-batches, on device
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # the first completions, readable
    started: float  # time.monotonic() when the policy was ready: earlier updates were done


class _Group(NamedTuple):
    """Completions of P prompts, of all processes, with their scores."""

    rollout: Rollout  # on device
    scores: np.ndarray  # [P, G], the verifier's
    lengths: np.ndarray  # [P, G], tokens
    ended: np.ndarray  # [P, G], by a token that ends a completion
    samples: list[_Sample]  # of this process, in order
    judged: list[Judged]  # by this process, dropped groups included
    uniform: float  # share of the groups sampled, dropped ones too, that score alike throughout
    started: float  # as in Experience
    rounds: int = 1  # rollouts that it took


class _Sample(NamedTuple):
    """A prompt's first completion, to be looked at."""

    index: int  # of the prompt among the P
    prompt: Prompt
    tokens: list[int]


def collect(
    setup: Setup,
    params: Params,
    reference: Params | None,
    prompts: grain.DatasetIterator[list[Prompt]],
    key: Key[Array, ""],
) -> Experience:
    """Samples, scores and cuts into mini-batches.

    Args:
        setup: config, devices, tokenizer and verifiers.
        params: the policy.
        reference: trunk parameters of the KL penalty's reference, or None.
        prompts: yields this process's prompts of a step at a time.
        key: of this step.

    Raises:
        UserError: dynamic sampling found too few informative groups in `rollout.max_rounds`, or a
            user's reward function fails on everything.
    """
    config = setup.config
    if config.rollout.dynamic_sampling:
        group = _sample_dynamically(setup, params, prompts, key)
    else:
        group = _sample_group(setup, params, next(prompts), key)
    seconds = time.monotonic() - group.started
    rewards = config.reward.wrong + (1 - config.reward.wrong) * group.scores
    if config.algorithm.overlong_buffer_tokens > 0:
        rewards = rewards + overlong_penalty(
            group.lengths,
            max_tokens=config.rollout.max_new_tokens,
            buffer_tokens=config.algorithm.overlong_buffer_tokens,
            factor=config.algorithm.overlong_penalty,
        )
    device_rewards = put_replicated(setup.mesh, rewards.astype(np.float32))
    batches = setup.programs.split(params, reference, group.rollout, device_rewards)
    metrics = _metrics(group, rewards)
    if config.rollout.dynamic_sampling:
        metrics["train/num_gen_batches"] = float(group.rounds)
    metrics["timing_s/rollout"] = seconds - metrics["timing_s/reward"]
    return Experience(
        batches=batches,
        metrics=metrics,
        samples=_samples(setup, group, rewards),
        started=group.started,
    )


def _sample_group(
    setup: Setup, params: Params, prompts: list[Prompt], key: Key[Array, ""]
) -> _Group:
    config, mesh, tokenizer = setup.config, setup.mesh, setup.tokenizer
    padded = (put_process_rows(mesh, x) for x in pad_prompts(config, tokenizer, prompts))
    rollout = setup.programs.sample(params, *padded, key)
    # The rollout is queued behind the updates that make `params`: waiting for these costs nothing
    # and separates their time from the rollout's.
    jax.block_until_ready(params)
    started = time.monotonic()
    size = config.rollout.group_size
    tokens = get_process_rows(mesh, rollout.tokens)[:, -config.rollout.max_new_tokens :]
    mask = get_process_rows(mesh, rollout.response_mask)
    examples = [prompt.example for prompt in prompts]
    tokens, mask = (x.reshape(len(prompts), size, -1) for x in (tokens, mask))
    scores, judged = judge_completions(setup.pool, config, tokenizer, examples, tokens)
    ended = np.any(np.isin(tokens, tokenizer.eos_ids) & mask, axis=-1)
    figures = np.stack([scores, mask.sum(-1), ended], axis=-1).astype(np.float32)
    scores, lengths, ended = np.moveaxis(gather_rows(figures), -1, 0)
    first = process_rows(len(scores)).start
    return _Group(
        rollout,
        scores,
        lengths.astype(np.int32),
        ended.astype(bool),
        [_Sample(first + i, p, tokens[i, 0].tolist()) for i, p in enumerate(prompts)],
        [judged],
        uniform=1.0 - float(informative_groups(scores).mean()),
        started=started,
    )


def _sample_dynamically(
    setup: Setup, params: Params, prompts: grain.DatasetIterator[list[Prompt]], key: Key[Array, ""]
) -> _Group:
    """Samples until enough groups are neither all right nor all wrong, and drops the surplus."""
    options, mesh = setup.config.rollout, setup.mesh
    wanted, size = options.num_prompts, options.group_size
    kept: _Group | None = None
    rounds: list[_Group] = []
    count = 0
    for number in range(options.max_rounds):
        group = _sample_group(setup, params, next(prompts), fold_in(mesh, key, number))
        rounds.append(group)
        keep = np.flatnonzero(informative_groups(group.scores))[: wanted - count]
        source = np.full(wanted, -1, np.int32)  # for every prompt: a group of this round, -1: none
        source[count : count + len(keep)] = keep
        source_rows = np.repeat(source * size, size) + np.tile(np.arange(size), wanted)
        source_rows = np.where(np.repeat(source < 0, size), -1, source_rows).astype(np.int32)
        kept = group if kept is None else kept
        kept = kept._replace(
            rollout=setup.programs.replace_rows(
                kept.rollout, group.rollout, put_replicated(mesh, source_rows)
            ),
            **{
                name: np.concatenate([getattr(kept, name)[:count], getattr(group, name)[keep]])
                for name in ("scores", "lengths", "ended")
            },
            samples=[
                *(kept.samples if count else []),
                *(
                    sample._replace(index=count + int(np.searchsorted(keep, sample.index)))
                    for sample in group.samples
                    if sample.index in keep
                ),
            ],
        )
        count += len(keep)
        if count == wanted:
            return kept._replace(
                judged=[judged for group in rounds for judged in group.judged],
                uniform=float(np.mean([group.uniform for group in rounds])),
                rounds=len(rounds),
            )
    raise TooFewGroups(
        f"dynamic sampling kept {count} of {wanted} groups after rollout.max_rounds="
        f"{options.max_rounds} rollouts; the task is too easy or too hard for this policy. "
        "The run goes on from here with a higher --rollout.max-rounds"
    )


def _metrics(group: _Group, rewards: np.ndarray) -> dict[str, float]:
    spread = {
        f"{name}/{statistic}": float(getattr(values, statistic)())
        for name, values in (
            ("critic/score", group.scores),
            ("critic/rewards", rewards),
            ("response_length", group.lengths),
        )
        for statistic in ("mean", "max", "min")
    }
    return {
        **spread,
        "critic/rewards/std": float(rewards.std()),
        "critic/frac_reward_zero_std": group.uniform,
        "response_length/clip_ratio": float(1.0 - group.ended.mean()),
        "rollout/tokens": float(group.lengths.sum()),
        **reward_metrics(group.judged, gather_rows),
    }


def _samples(setup: Setup, group: _Group, rewards: np.ndarray) -> list[dict[str, Any]]:
    """The first completions of the first prompts, whichever process has them."""
    own = [
        (
            index,
            {
                "id": prompt.example.id,
                "prompt": prompt_text(setup.config, prompt.example),
                "completion": decode_completion(setup.tokenizer, tokens),
                "answer": prompt.example.answer,
                "score": float(group.scores[index, 0]),
                "reward": float(rewards[index, 0]),
            },
        )
        for index, prompt, tokens in group.samples
        if index < setup.config.run.num_logged_samples
    ]
    numbered = [pair for pairs in gather_objects(own) for pair in pairs]
    return [sample for _, sample in sorted(numbered, key=lambda pair: pair[0])]
