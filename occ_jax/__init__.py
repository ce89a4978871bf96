"""Reinforcement learning of language models that keep their multi-token-prediction heads.

The calibration works on any two losses and needs only jax and optax:

    tx = optax.chain(occ_jax.calibrate_auxiliary(), optax.adamw(1e-6))
    updates, state = tx.update(grads, state, params, auxiliary_updates=aux_grads)

The trainer is `train(load_config("reverse_digits"))`, after `pip install 'occ_jax[train]'`; the
submodules `models` and `rl` hold its parts. Everything is imported when first used, so that the
processes that verify completions can import `occ_jax.rewards` without loading JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from occ_jax.errors import missing_extra
from occ_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from occ_jax import models as models, rl as rl
    from occ_jax.calibration import *  # noqa: F403
    from occ_jax.cli.config_file import load_config as load_config
    from occ_jax.config import Config as Config
    from occ_jax.training.loop import train as train

_MODULES = {
    "CalibrationState": "occ_jax.calibration",
    "Config": "occ_jax.config",
    "FixedAuxiliaryState": "occ_jax.calibration",
    "Statistics": "occ_jax.calibration",
    "calibrate_auxiliary": "occ_jax.calibration",
    "cross_batch_statistics": "occ_jax.calibration",
    "fixed_auxiliary": "occ_jax.calibration",
    "inner_product_statistics": "occ_jax.calibration",
    "load_config": "occ_jax.cli.config_file",
    "log_prob_statistics": "occ_jax.calibration",
    "models": "occ_jax.models",
    "optimal_coefficient": "occ_jax.calibration",
    "released_code_coefficient": "occ_jax.calibration",
    "rl": "occ_jax.rl",
    "train": "occ_jax.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'occ_jax' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        extra = "train" if name == "train" else "models"
        raise ImportError(missing_extra(error, f"occ_jax.{name}", extra)) from None
    value = module if name in ("models", "rl") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
