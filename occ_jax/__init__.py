"""Reinforcement learning of language models that keep their multi-token-prediction heads.

The calibration works on any two losses and needs only jax and optax:

    tx = optax.chain(occ_jax.calibrate_auxiliary(), optax.adamw(1e-6))
    updates, state = tx.update(grads, state, params, auxiliary_updates=aux_grads)

Submodules `models` and `rl` hold the rest. Everything is imported when first used, so that the
processes that verify completions can import `occ_jax.rewards` without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occ_jax import models, rl
    from occ_jax.calibration import (
        CalibrationState,
        FixedAuxiliaryState,
        Statistics,
        calibrate_auxiliary,
        cross_batch_statistics,
        fixed_auxiliary,
        inner_product_statistics,
        log_prob_statistics,
        optimal_coefficient,
        released_code_coefficient,
    )

__version__ = "0.1.0"

__all__ = [
    "CalibrationState",
    "FixedAuxiliaryState",
    "Statistics",
    "calibrate_auxiliary",
    "cross_batch_statistics",
    "fixed_auxiliary",
    "inner_product_statistics",
    "log_prob_statistics",
    "models",
    "optimal_coefficient",
    "released_code_coefficient",
    "rl",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'occ_jax' has no attribute {name!r}")
    if name in ("models", "rl"):
        return importlib.import_module(f"occ_jax.{name}")
    value = getattr(importlib.import_module("occ_jax.calibration"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
