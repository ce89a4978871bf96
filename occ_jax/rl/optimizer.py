"""The optax chains: calibration -> clip -> adamw for the trunk, clip -> adamw for the modules.

Two chains, because one global norm over both would let the modules' gradient scale the trunk's
update, and `detach` would leak. The calibration itself is chosen in `regime`.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from occ_jax.calibration import Statistics
from occ_jax.config import Config
from occ_jax.rl.regime import calibration
from occ_jax.types import Params


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """One transformation over {"trunk": θ, "mtp": φ}.

    `update` takes `auxiliary_updates` (a list of K gradients of θ, or None) and `statistics`
    as `occ_jax.calibrate_auxiliary` does; both concern the trunk alone.
    """
    trunk = optax.chain(calibration(config), *_descent(config))
    mtp = optax.chain(*_descent(config))

    def init_fn(params: Any) -> Any:
        return {"trunk": trunk.init(params["trunk"]), "mtp": mtp.init(params["mtp"])}

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        auxiliary_updates: list[Params] | None = None,
        statistics: Statistics | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params=None; allowed: the parameters, which weight decay reads")
        theta, trunk_state = trunk.update(
            updates["trunk"],
            state["trunk"],
            params["trunk"],
            auxiliary_updates=auxiliary_updates,
            statistics=statistics,
        )
        phi, mtp_state = mtp.update(updates["mtp"], state["mtp"], params["mtp"])
        return {"trunk": theta, "mtp": phi}, {"trunk": trunk_state, "mtp": mtp_state}

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Linear warm-up to a constant, in updates."""
    optimizer = config.optimizer
    if optimizer.warmup_steps == 0:
        return optax.constant_schedule(optimizer.learning_rate)
    return optax.warmup_constant_schedule(0.0, optimizer.learning_rate, optimizer.warmup_steps)


def _descent(config: Config) -> tuple[optax.GradientTransformation, ...]:
    optimizer = config.optimizer
    return (
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=optimizer.b1,
            b2=optimizer.b2,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Any) -> Any:
    """Masks out the routers' correction biases: no gradient holds them against the decay."""
    bias = jax.tree_util.DictKey("correction_bias")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] != bias, params)
