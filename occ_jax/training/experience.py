"""One step's experience: prompts -> completions -> rewards -> groups kept -> mini-batches.

The host side of a step. Rewards are computed here because verifiers are host programs in general;
everything before and after them stays on device. Of several processes each samples and judges its
block of the prompts (`occ_jax.parallel.exchange`); scores and lengths of all are gathered, so all
keep the same groups and log the same figures.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from occ_jax.config import Config, computation
from occ_jax.data.examples import Prompt, prompt_text
from occ_jax.data.pipeline import pad_prompts
from occ_jax.data.tokenizer import Tokenizer, decode_completion
from occ_jax.errors import UserError
from occ_jax.models.model import Model
from occ_jax.models.scoring import auxiliary_states, score_tokens, trunk_states
from occ_jax.parallel.exchange import (
    fold_in,
    gather_objects,
    gather_rows,
    get_process_rows,
    process_rows,
    put_process_rows,
    put_replicated,
)
from occ_jax.parallel.sharding import on_mesh, row_shardings
from occ_jax.rewards.pool import Judged, VerifierPool, reward_metrics
from occ_jax.rewards.scoring import judge_completions
from occ_jax.rewards.shaping import informative_groups, overlong_penalty
from occ_jax.rl.advantages import group_advantages, rloo_advantages
from occ_jax.rl.gradients import micro_batches
from occ_jax.rl.losses import rollout_correction
from occ_jax.rollout.sampler import on_sampling_mesh, sample_in_chunks
from occ_jax.types import Batch, Params, Rollout, map_rows


class TooFewGroups(UserError):
    """Dynamic sampling reached its cap, on all processes alike."""


class Experience(NamedTuple):
    """What one step trains on and what it logs."""

    batches: list[Batch]  # updates_per_rollout mini-batches, on device
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # the first completions, readable
    started: float  # time.monotonic() when the policy was there: earlier updates were done


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

    place: int  # of the prompt among the P
    prompt: Prompt
    tokens: list[int]


def collect(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    reference: Params | None,
    prompts: grain.DatasetIterator[list[Prompt]],
    key: Key[Array, ""],
    pool: VerifierPool,
) -> Experience:
    """Samples, scores and cuts into mini-batches.

    Args:
        model: the architecture.
        config: sections task, dataset, rollout, reward, algorithm, mtp.
        mesh: where `params` lie.
        tokenizer: of the prompts.
        params: the policy.
        reference: trunk parameters of the KL penalty's reference, or None.
        prompts: yields `rollout.num_prompts` of them at a time.
        key: of this step.
        pool: judges completions.

    Raises:
        UserError: dynamic sampling found too few informative groups in `rollout.max_rounds`, or a
            reward function of the user's fails on everything.
    """
    group = (
        _dynamic(model, config, mesh, tokenizer, params, prompts, key, pool)
        if config.rollout.dynamic_sampling
        else _sample_group(model, config, mesh, tokenizer, params, next(prompts), key, pool)
    )
    seconds = time.monotonic() - group.started
    rewards = config.reward.wrong + (1 - config.reward.wrong) * group.scores
    if config.algorithm.overlong_buffer_tokens > 0:
        rewards = rewards + overlong_penalty(
            group.lengths,
            max_tokens=config.rollout.max_new_tokens,
            buffer_tokens=config.algorithm.overlong_buffer_tokens,
            factor=config.algorithm.overlong_penalty,
        )
    split = jit_splitter(model, computation(config), mesh)
    rewards_there = put_replicated(mesh, rewards.astype(np.float32))
    batches = split(params, reference, group.rollout, rewards_there)
    metrics = _metrics(group, rewards)
    if config.rollout.dynamic_sampling:
        metrics["train/num_gen_batches"] = float(group.rounds)
    metrics["timing_s/rollout"] = seconds - metrics["timing_s/reward"]
    return Experience(
        batches=batches,
        metrics=metrics,
        samples=_samples(config, tokenizer, group, rewards),
        started=group.started,
    )


def _sample_group(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    prompts: list[Prompt],
    key: Key[Array, ""],
    pool: VerifierPool,
) -> _Group:
    padded = (put_process_rows(mesh, x) for x in pad_prompts(config, tokenizer, prompts))
    ends, filler = tokenizer.eos_ids, tokenizer.pad_id
    rollout = jit_sampler(model, computation(config), mesh, ends, filler)(params, *padded, key)
    # The rollout is under way, behind the updates that make `params`: waiting for these costs
    # nothing and tells the two apart.
    jax.block_until_ready(params)
    started = time.monotonic()
    size = config.rollout.group_size
    tokens = get_process_rows(mesh, rollout.tokens)[:, -config.rollout.max_new_tokens :]
    mask = get_process_rows(mesh, rollout.response_mask)
    examples = [prompt.example for prompt in prompts]
    tokens, mask = (x.reshape(len(prompts), size, -1) for x in (tokens, mask))
    scores, judged = judge_completions(pool, config, tokenizer, examples, tokens)
    ended = np.any(np.isin(tokens, ends) & mask, axis=-1)
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


def _dynamic(
    model: Model,
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer,
    params: Params,
    prompts: grain.DatasetIterator[list[Prompt]],
    key: Key[Array, ""],
    pool: VerifierPool,
) -> _Group:
    """Draws prompts until enough groups are neither all right nor all wrong, drops the surplus."""
    wanted, size = config.rollout.num_prompts, config.rollout.group_size
    fill = _filler(mesh)
    kept: _Group | None = None
    rounds: list[_Group] = []
    have = 0
    for number in range(config.rollout.max_rounds):
        found = _sample_group(
            model,
            config,
            mesh,
            tokenizer,
            params,
            next(prompts),
            fold_in(mesh, key, number),
            pool,
        )
        rounds.append(found)
        keep = np.flatnonzero(informative_groups(found.scores))[: wanted - have]
        source = np.full(wanted, -1, np.int32)  # of every place: a group of this round, or as it is
        source[have : have + len(keep)] = keep
        source_rows = np.repeat(source * size, size) + np.tile(np.arange(size), wanted)
        source_rows = np.where(np.repeat(source < 0, size), -1, source_rows).astype(np.int32)
        kept = found if kept is None else kept
        kept = kept._replace(
            rollout=fill(kept.rollout, found.rollout, put_replicated(mesh, source_rows)),
            **{
                name: np.concatenate([getattr(kept, name)[:have], getattr(found, name)[keep]])
                for name in ("scores", "lengths", "ended")
            },
            samples=[
                *(kept.samples if have else []),
                *(
                    sample._replace(place=have + int(np.searchsorted(keep, sample.place)))
                    for sample in found.samples
                    if sample.place in keep
                ),
            ],
        )
        have += len(keep)
        if have == wanted:
            return kept._replace(
                judged=[judged for group in rounds for judged in group.judged],
                uniform=float(np.mean([group.uniform for group in rounds])),
                rounds=len(rounds),
            )
    raise TooFewGroups(
        f"dynamic sampling kept {have} of {wanted} groups after rollout.max_rounds="
        f"{config.rollout.max_rounds} rollouts; the task is too easy or too hard for this policy. "
        "The run goes on from here with a higher --rollout.max-rounds"
    )


@functools.lru_cache(maxsize=16)
def _filler(mesh: Mesh) -> Callable[[Rollout, Rollout, Array], Rollout]:
    """Replaces rows of one rollout by rows of another; row -1 leaves what is there."""

    def fill(kept: Rollout, found: Rollout, source: Int[Array, " B"]) -> Rollout:
        def pick(old: Array, new: Array, axis: int) -> Array:
            shape = [1] * old.ndim
            shape[axis] = -1
            taken = jnp.take(new, jnp.maximum(source, 0), axis=axis)
            return jnp.where((source < 0).reshape(shape), old, taken)

        axes = map_rows(lambda _, axis: axis, kept)
        return jax.tree.map(lambda axis, old, new: pick(old, new, axis), axes, kept, found)

    every_field: Any = Rollout._fields
    return jax.jit(fill, out_shardings=row_shardings(mesh, Rollout(*every_field)))


def _scores_modules(config: Config) -> bool:
    """Whether this run needs the modules' log-probabilities under the old policy."""
    policy_on_trunk = config.mtp.regime in ("policy", "occ")
    return (
        config.model.num_mtp_modules > 0
        and config.mtp.auxiliary_ratio == "own"
        and (policy_on_trunk or config.mtp.head_loss == "policy")
    )


@functools.lru_cache(maxsize=16)
def jit_sampler(
    model: Model, config: Config, mesh: Mesh, eos_ids: tuple[int, ...], pad_id: int
) -> Callable[..., Rollout]:
    """`sample` compiled for a config: (params, prompts, prompt_valid, key) to a `Rollout`."""
    run = functools.partial(
        sample_in_chunks,
        config.rollout.sampling_chunks,
        model,
        group_size=config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        eos_ids=eos_ids,
        pad_id=pad_id,
        auxiliary=_scores_modules(config) and config.rollout.old_log_probs == "sampler",
    )
    # Any field may be missing in a rollout; a sharding for one that is does no harm.
    every_field: Any = Rollout._fields
    shardings = row_shardings(mesh, Rollout(*every_field))
    return jax.jit(on_sampling_mesh(config, mesh, run), out_shardings=shardings)


@functools.lru_cache(maxsize=16)
def jit_splitter(model: Model, config: Config, mesh: Mesh) -> Callable[..., list[Batch]]:
    """Advantages and mini-batches; scores the rollout again where the config asks for it."""
    updates, temperature = config.algorithm.updates_per_rollout, config.rollout.temperature
    pieces = updates * config.algorithm.micro_batches

    def score(
        params: Params, rollout: Rollout, modules: bool
    ) -> tuple[Float[Array, "B R"], Float[Array, "K B R"] | None]:
        """In pieces as those of an update, which there is room for."""
        main, heads = jax.lax.map(
            lambda piece: _score(model, params, piece, temperature, modules),
            micro_batches(rollout, pieces),
        )
        if heads is not None:
            heads = jnp.moveaxis(heads, 1, 0)
            heads = heads.reshape(heads.shape[0], -1, heads.shape[-1])
        return main.reshape(-1, main.shape[-1]), heads

    def run(
        params: Params, reference: Params | None, rollout: Rollout, rewards: Float[Array, "P G"]
    ) -> list[Batch]:
        old, auxiliary = rollout.log_probs, rollout.auxiliary_log_probs
        if config.rollout.old_log_probs == "trainer":
            old, auxiliary = score(params, rollout, _scores_modules(config))
        cap, weights = config.algorithm.rollout_correction_cap, None
        if cap is not None:
            weights = rollout_correction(old, rollout.log_probs, cap=cap)
        reference_log_probs = None
        if reference is not None:
            reference_log_probs, _ = score({"trunk": reference}, rollout, False)
        whole = Batch(
            tokens=rollout.tokens,
            valid=rollout.valid,
            response_mask=rollout.response_mask,
            old_log_probs=old,
            old_auxiliary_log_probs=auxiliary,
            reference_log_probs=reference_log_probs,
            weights=weights,
            advantages=_advantages(config, rewards).reshape(-1),
        )
        size = whole.advantages.shape[0] // updates

        def cut(x: Array, axis: int, number: int) -> Array:
            return jax.lax.slice_in_dim(x, number * size, (number + 1) * size, axis=axis)

        batches = [
            map_rows(functools.partial(cut, number=number), whole) for number in range(updates)
        ]
        shardings = [row_shardings(mesh, batch) for batch in batches]
        return jax.lax.with_sharding_constraint(batches, shardings)

    return jax.jit(on_mesh(mesh, run))


def _advantages(config: Config, rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    match config.algorithm.advantage:
        case "group":
            return group_advantages(rewards)
        case "group_mean":
            return group_advantages(rewards, normalize_std=False)
        case "rloo":
            return rloo_advantages(rewards)


def _score(
    model: Model, params: Params, rollout: Rollout, temperature: float, modules: bool
) -> tuple[Float[Array, "B R"], Float[Array, "K B R"] | None]:
    """Log-probabilities by the trainer's own forward pass."""
    response = rollout.response_mask.shape[1]
    theta, targets = params["trunk"], rollout.tokens[:, -response:]
    states = trunk_states(model, theta, rollout.tokens, rollout.valid)

    def by(hidden: Array) -> Array:
        return score_tokens(model, theta, hidden, targets, temperature).log_probs

    main = by(states.hidden[:, -response:])
    if not modules:
        return main, None
    heads = auxiliary_states(
        model, params, states.mtp_input, rollout.tokens, rollout.valid, response
    )
    return main, jnp.stack([by(head) for head in heads])


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


def _samples(
    config: Config, tokenizer: Tokenizer, group: _Group, rewards: np.ndarray
) -> list[dict[str, Any]]:
    """The first completions of the first prompts, whichever process has them."""
    own = [
        (
            place,
            {
                "id": prompt.example.id,
                "prompt": prompt_text(config, prompt.example),
                "completion": decode_completion(tokenizer, tokens),
                "answer": prompt.example.answer,
                "score": float(group.scores[place, 0]),
                "reward": float(rewards[place, 0]),
            },
        )
        for place, prompt, tokens in group.samples
        if place < config.run.num_logged_samples
    ]
    found = [pair for pairs in gather_objects(own) for pair in pairs]
    return [sample for _, sample in sorted(found, key=lambda pair: pair[0])]
