"""How far eight devices are from one: the largest deviations by mesh, regime and model.

    python benchmarks/sharding_equality.py

Two updates in float32 on eight virtual CPU devices against the same two on one. A deviation is the
largest difference in an array relative to that array's largest entry; for parameters and moments,
that of the worst array. Rollouts are compared too: their tokens have to be the same.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.meshes import (
    MESHES,
    REGIMES,
    deviations,
    on_one_device,
    samples,
    two_updates,
)

_SHOWN = {
    "loss": "loss",
    "coefficient": "λ",
    "correlation": "c",
    "penalty": "G",
    "params": "parameters",
    "moments": "moments",
}


def main() -> None:
    # Programs that compile quickly: it is their numbers that matter.
    jax.config.update("jax_disable_most_optimizations", True)
    print("| model | mesh (data, fsdp, tensor, expert) | " + " | ".join(_SHOWN.values()), end="")
    print(" | worst regime | rollout log-probs |")
    print("|---" * (len(_SHOWN) + 4) + "|")
    for model, meshes in MESHES.items():
        one = samples(model, (1, 1, 1, 1))
        for mesh in meshes:
            found = {
                regime: deviations(two_updates(model, regime, mesh), on_one_device(model, regime))
                for regime in REGIMES
            }
            worst = {name: max(apart[name] for apart in found.values()) for name in _SHOWN}
            regime = max(found, key=lambda regime: max(found[regime].values()))
            cells = [f"{worst[name]:.1e}" for name in _SHOWN]
            apart = max(map(_rollouts_apart, samples(model, mesh), one))
            # Programs take maps of memory, of which Linux gives a process 65,530.
            jax.clear_caches()
            shape = " × ".join(map(str, mesh))
            print(
                f"| {model} | {shape} | {' | '.join(cells)} | {regime} | {apart:.1e} |", flush=True
            )


def _rollouts_apart(actual: object, wanted: object) -> float:
    """The largest difference of log-probabilities, in nats; inf where a token differs."""
    leaves = list(zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True))
    same = all(np.array_equal(x, y) for x, y in leaves if not np.issubdtype(y.dtype, np.floating))
    floats = [np.max(np.abs(x - y)) for x, y in leaves if np.issubdtype(y.dtype, np.floating)]
    return float(max(floats)) if same else float("inf")


if __name__ == "__main__":
    main()
