"""What a mesh computes against what one device computes, by model, regime and mesh.

Shared by the tests, which go through a covering set of combinations, and by
`benchmarks/sharding_equality.py`, which goes through all of them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occ_jax.config import (
    AlgorithmConfig,
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    RolloutConfig,
)
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import make_mesh, row_sharding, row_shardings, state_shardings
from occ_jax.programs import make_programs
from occ_jax.rl.train_step import place_state
from occ_jax.rollout.sampler import on_sampling_mesh, sample
from occ_jax.types import Batch, Rollout

B, P, R, V = 8, 4, 5, 16
K = 2

DENSE = ModelConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=8,
    num_kv_heads=8,
    head_dim=2,
    intermediate_size=16,
    vocab_size=V,
    num_mtp_modules=K,
)
# Scanned, rematerialised and scored in pieces as well.
MOE = dataclasses.replace(
    DENSE,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
    moe=MoEConfig(
        num_experts=8, experts_per_token=2, intermediate_size=8, shared_intermediate_size=8
    ),
    scan_layers=True,
    remat="full",
    logits_columns=3,
)
MODELS = {"dense": DENSE, "moe": MOE}

# data, fsdp, tensor, expert.
MESHES: dict[str, list[tuple[int, int, int, int]]] = {
    "dense": [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (4, 2, 1, 1), (2, 1, 4, 1), (2, 2, 2, 1)],
    "moe": [
        *[(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 2, 1), (1, 1, 1, 8), (2, 2, 2, 1)],
        *[(4, 1, 1, 2), (1, 4, 1, 2), (1, 1, 2, 4), (2, 2, 1, 2), (1, 2, 2, 2)],
    ],
}

REGIMES: dict[str, dict[str, Any]] = {
    "detach": {"regime": "detach"},
    "ce": {"regime": "ce", "coefficient": 0.5},
    "policy": {"regime": "policy", "coefficient": 0.5},
    "occ/exact": {"regime": "occ", "estimator": "exact"},
    "occ/cross_batch": {"regime": "occ", "estimator": "cross_batch"},
    "occ/log_prob": {"regime": "occ", "estimator": "log_prob"},
}


class Found(NamedTuple):
    """What two updates of one run came to; a leaf's first dimension is the update's number."""

    loss: Any
    coefficient: Any  # lambda as applied
    correlation: Any  # c
    penalty: Any  # G
    params: Any  # after the second
    moments: Any  # AdamW's, with the coefficient's EMAs
    metrics: dict[str, Any]  # all there are


def make_config(model: str, regime: str, mesh: tuple[int, int, int, int] = (1, 1, 1, 1)) -> Config:
    return Config(
        model=MODELS[model],
        rollout=RolloutConfig(num_prompts=16, group_size=2, max_new_tokens=R),
        algorithm=AlgorithmConfig(
            updates_per_rollout=2, micro_batches=2 if regime == "occ/cross_batch" else 1
        ),
        mtp=MTPConfig(**REGIMES[regime]),
        # An eps far above the gradient's rounding: Adam would turn a zero's sign into a whole step.
        optimizer=OptimizerConfig(learning_rate=0.1, eps=0.1, clip_norm=0.5),
        mesh=MeshConfig(*mesh),
    )


@functools.cache
def parameters(model: str) -> Any:
    return Model(MODELS[model]).init(jax.random.key(0))


@functools.cache
def make_batch() -> Batch:
    """Left-padded prompts of 3 to 4 tokens, responses of 1 to 5."""
    random, rows = np.random.default_rng(0), 2 * B
    column = np.arange(P + R)[None, :]
    prompts = random.integers(K + 1, P + 1, (rows, 1))
    responses = random.integers(1, R + 1, (rows, 1))
    valid = (column >= P - prompts) & (column < P + responses)
    old = random.normal(-2.5, 0.2, (K + 1, rows, R)).astype(np.float32)
    return Batch(
        tokens=jnp.asarray(random.integers(0, V, (rows, P + R)), jnp.int32),
        valid=jnp.asarray(valid),
        response_mask=jnp.asarray(valid[:, P:]),
        old_log_probs=jnp.asarray(old[0]),
        old_auxiliary_log_probs=jnp.asarray(old[1:]),
        reference_log_probs=None,
        weights=None,
        advantages=jnp.asarray(random.normal(size=rows), jnp.float32),
    )


def two_updates(model: str, regime: str, mesh: tuple[int, int, int, int]) -> Found:
    """Two, as the coefficient of some estimators is 0 in the first."""
    config = make_config(model, regime, mesh)
    devices = make_mesh(config.mesh)
    own = jax.tree.map(jnp.copy, parameters(model))  # the state takes the buffers over
    own = jax.device_put(own, state_shardings(devices, own))
    state = place_state(config, own, 0, devices)
    step = make_programs(config, devices, (1,), 0).update
    batch = jax.device_put(make_batch(), row_shardings(devices, Batch))
    history = []
    for _ in range(2):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_shardings(devices, state)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    def every(start: str) -> np.ndarray:
        names = sorted(name for name in history[0] if name.startswith(start))
        return np.array([[metrics[name] for name in names] for metrics in history])

    return Found(
        loss=every("actor/pg_loss"),
        coefficient=every("occ/coefficient"),
        correlation=every("occ/correlation"),
        penalty=every("occ/penalty"),
        params=jax.device_get(state.params),
        moments=jax.device_get(state.opt_state),
        metrics={name: np.array([x[name] for x in history]) for name in history[0]},
    )


@functools.cache
def on_one_device(model: str, regime: str) -> Found:
    return two_updates(model, regime, (1, 1, 1, 1))


def deviations(found: Found, wanted: Found) -> dict[str, float]:
    """By field: the largest difference in an array relative to that array's largest entry."""

    def worst(actual: Any, expected: Any) -> float:
        found = 0.0
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            if y.size and np.issubdtype(y.dtype, np.floating):
                found = max(found, float(np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-30)))
        return found

    fields = (name for name in Found._fields if name != "metrics")
    return {name: worst(getattr(found, name), getattr(wanted, name)) for name in fields}


def samples(
    model: str, mesh: tuple[int, int, int, int], *, gather_weights: bool = True
) -> tuple[Rollout, Rollout]:
    """Completions at temperature 1, scored by the modules, and the most probable ones."""
    config = MODELS[model]
    options = RolloutConfig(gather_weights=gather_weights)
    devices = make_mesh(MeshConfig(*mesh))

    def run(params: Any, prompts: Any, valid: Any, key: Any) -> tuple[Rollout, Rollout]:
        options: dict[str, Any] = {
            "group_size": 2,
            "max_new_tokens": R,
            "eos_ids": (1,),
            "pad_id": 0,
        }
        arguments = (Model(config), params, prompts, valid, key)
        return (
            sample(*arguments, **options, temperature=1.0, auxiliary=True),
            sample(*arguments, **options, temperature=0.0),
        )

    params = jax.device_put(parameters(model), state_shardings(devices, parameters(model)))
    prompts = jax.device_put(
        (make_batch().tokens[:B, :P], make_batch().valid[:B, :P]), row_sharding(devices)
    )
    run = on_sampling_mesh(Config(model=config, rollout=options), devices, run)
    return jax.device_get(jax.jit(run)(params, *prompts, jax.random.key(3)))
