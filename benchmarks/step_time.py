"""Seconds per update of every regime, and of one whole RL step, as ratios within one run.

    python benchmarks/step_time.py [--json]

1. Updates of a 32-layer model of 15M parameters on 4,096 tokens (32 rows of 128, two
   micro-batches), all variants in turn in one process, so that a machine that slows down slows all
   of them. The ratio to detach is taken within each round; reported is the median over rounds.
   Depth matters: a module costs one block, so its share falls with the trunk's (MiMo-7B has 36
   blocks to one).
2. One RL step of a common toy workload: reverse six digits, 2 layers, d 64, 4 heads, MLP 192;
   32 prompts x 16 samples, 8 new tokens, 4 updates of 128 samples, float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from occ_jax.cli.runtime import keep_freed_memory
from occ_jax.config import (
    AlgorithmConfig,
    Config,
    Estimator,
    ModelConfig,
    MTPConfig,
    Regime,
    RolloutConfig,
)
from occ_jax.data.pipeline import iterate, training_prompts
from occ_jax.data.tokenizer import DIGITS
from occ_jax.models import Model, num_parameters
from occ_jax.parallel.sharding import make_mesh
from occ_jax.programs import make_programs
from occ_jax.rl.train_step import place_state
from occ_jax.setup import open_setup
from occ_jax.training.experience import collect
from occ_jax.types import Batch, TrainState

_ROWS, _PROMPT, _RESPONSE = 32, 64, 64
_EVERY = 8


def large_config(regime: Regime, estimator: Estimator) -> Config:
    """A model large enough that matrix products are what takes the time."""
    return Config(
        model=ModelConfig(
            hidden_size=192,
            num_layers=32,
            num_heads=4,
            num_kv_heads=4,
            head_dim=48,
            intermediate_size=512,
            vocab_size=512,
        ),
        rollout=RolloutConfig(num_prompts=8, group_size=4, max_new_tokens=_RESPONSE),
        algorithm=AlgorithmConfig(updates_per_rollout=2, micro_batches=2),
        mtp=MTPConfig(regime=regime, estimator=estimator),
    )


def random_batch(config: Config) -> Batch:
    """A mini-batch of full rows."""
    keys = jax.random.split(jax.random.key(1), 4)
    shape, columns = (_ROWS, _RESPONSE), _PROMPT + _RESPONSE
    return Batch(
        tokens=jax.random.randint(keys[0], (_ROWS, columns), 2, config.model.vocab_size),
        valid=jnp.ones((_ROWS, columns), bool),
        response_mask=jnp.ones(shape, bool),
        old_log_probs=-6.0 + 0.1 * jax.random.normal(keys[1], shape),
        old_auxiliary_log_probs=-6.0 + 0.1 * jax.random.normal(keys[2], (1, *shape)),
        reference_log_probs=None,
        weights=None,
        advantages=jax.random.normal(keys[3], (_ROWS,)),
    )


def make_update(mesh: Mesh, config: Config, *, measure: bool) -> Callable[[], None]:
    """A function that does one update and waits for it."""
    programs = make_programs(config, mesh, DIGITS.eos_ids, DIGITS.pad_id)
    step = programs.update if measure else programs.update_between
    state: TrainState = place_state(config, programs.model.init(jax.random.key(0)), 0, mesh)
    batch = random_batch(config)

    def update() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    return update


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def update_times(rounds: int) -> dict[str, list[float]]:
    """Seconds of one update of each variant, `rounds` times in turn, after compilation."""
    mesh = make_mesh(Config().mesh)
    updates = {
        "detach": make_update(mesh, large_config("detach", "log_prob"), measure=True),
        "policy": make_update(mesh, large_config("policy", "log_prob"), measure=True),
        "occ/log_prob": make_update(mesh, large_config("occ", "log_prob"), measure=True),
        "occ/exact": make_update(mesh, large_config("occ", "exact"), measure=True),
        "occ/cross_batch": make_update(mesh, large_config("occ", "cross_batch"), measure=True),
        "occ/exact, between": make_update(mesh, large_config("occ", "exact"), measure=False),
    }
    times: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        update()
    names = list(updates)
    # What an update leaves behind in caches and heap is paid by the next: up to 5%. In this order,
    # shifted by one each round, each variant comes once after each other in as many rounds as there
    # are variants, an even number (E. J. Williams, 1949).
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(len(names))]
    for number in range(rounds):
        print(f"round {number + 1}/{rounds}", end="\r", file=sys.stderr, flush=True)
        for place in zigzag:
            name = names[(place + number) % len(names)]
            times[name].append(seconds(updates[name]))
    between = times.pop("occ/exact, between")
    times[f"occ/exact every {_EVERY}th"] = [
        (measured + (_EVERY - 1) * free) / _EVERY
        for measured, free in zip(times["occ/exact"], between, strict=True)
    ]
    return times


def rl_step_times(num_mtp_modules: int, steps: int) -> dict[str, float]:
    """Median seconds of rollout (sampling, rewards, advantages) and of the four updates."""
    regime = "occ" if num_mtp_modules else "detach"
    config = Config(
        model=ModelConfig(num_mtp_modules=num_mtp_modules),
        rollout=RolloutConfig(num_prompts=32, group_size=16, max_new_tokens=8),
        algorithm=AlgorithmConfig(updates_per_rollout=4),
        mtp=MTPConfig(regime=regime, estimator="log_prob"),
    )
    prompts = iterate(training_prompts(config, DIGITS).prompts, config.rollout.num_prompts)
    rollout: list[float] = []
    update: list[float] = []
    with open_setup(config) as setup:
        state = place_state(config, setup.model.init(jax.random.key(0)), 0, setup.mesh)
        for number in range(steps + 1):
            start = time.perf_counter()
            key = jax.random.fold_in(state.key, number)
            experience = collect(setup, state.params, None, prompts, key)
            batches = jax.block_until_ready(experience.batches)
            middle = time.perf_counter()
            for batch in batches:
                state, _ = setup.programs.update(state, batch)
            jax.block_until_ready(state)
            rollout.append(middle - start)
            update.append(time.perf_counter() - middle)
    whole = [a + b for a, b in zip(rollout[1:], update[1:], strict=True)]
    return {
        "rollout": statistics.median(rollout[1:]),
        "update": statistics.median(update[1:]),
        "step": statistics.median(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--rounds", type=int, default=12, help="timed updates a variant (12)")
    options = parser.parse_args()
    keep_freed_memory()
    config = large_config("occ", "exact")
    shapes = jax.eval_shape(Model(config.model).init, jax.random.key(0))
    toy = {
        "one MTP module": rl_step_times(1, 40),
        "no MTP module": rl_step_times(0, 40),
    }
    times = update_times(options.rounds)
    ratios = {
        name: float(np.median(np.divide(values, times["detach"]))) for name, values in times.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    parameters, tokens = num_parameters(shapes), _ROWS * (_PROMPT + _RESPONSE)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": parameters,
        "tokens": tokens,
        "rounds": options.rounds,
        "seconds": medians,
        "ratios": ratios,
        "rl_step": toy,
        "config": dataclasses.asdict(config.model),
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"update, {parameters / 1e6:.1f}M parameters, {tokens} tokens\n")
    print("| variant | s/update | ratio to detach |\n|---|---|---|")
    for name, ratio in ratios.items():
        print(f"| {name} | {medians[name]:.3f} | {ratio:.3f} |")
    print("\none RL step of the toy workload, milliseconds\n")
    print("| model | rollout | 4 updates | whole step |\n|---|---|---|---|")
    for name, parts in toy.items():
        cells = " | ".join(f"{1000 * parts[part]:.0f}" for part in ("rollout", "update", "step"))
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
