# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false
"""The optax chains: calibrate_auxiliary -> clip -> adamw for the trunk, clip -> adamw for modules.

Two chains, because one global norm over both would let the modules' gradient scale the trunk's
update, and `detach` would leak.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from occ_jax.calibration import Statistics, calibrate_auxiliary, fixed_auxiliary
from occ_jax.config import Config
from occ_jax.types import Params


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """One transformation over {"trunk": theta, "mtp": phi}.

    `update` takes `auxiliary_updates` (a list of K gradients of theta, or None) and `statistics`
    as `occ_jax.calibrate_auxiliary` does; both concern the trunk alone.
    """
    trunk = optax.chain(_coefficient(config), *_descent(config))
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
        assert params is not None, "weight decay reads the parameters"
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


def current_coefficient(config: Config, opt_state: Any) -> Float[Array, " K"]:
    """lambda as the optimizer state holds it, before this update: zeros under `detach`."""
    depth = config.model.num_mtp_modules
    if config.mtp.regime == "detach":
        return jnp.zeros(depth)
    coefficient = optax.tree_utils.tree_get(opt_state["trunk"], "coefficient")
    assert isinstance(coefficient, jax.Array)
    return coefficient


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Linear warm-up to a constant, in updates."""
    optimizer = config.optimizer
    if optimizer.warmup_steps == 0:
        return optax.constant_schedule(optimizer.learning_rate)
    return optax.warmup_constant_schedule(0.0, optimizer.learning_rate, optimizer.warmup_steps)


def _coefficient(config: Config) -> optax.GradientTransformationExtraArgs:
    mtp, depth = config.mtp, config.model.num_mtp_modules
    match mtp.regime:
        case "detach":
            return optax.with_extra_args_support(optax.identity())
        case "ce" | "policy":
            return fixed_auxiliary(mtp.coefficient, num_auxiliary=depth)
        case "occ":
            return calibrate_auxiliary(
                mtp.scale,
                decay=mtp.decay,
                bounds=mtp.bounds,
                eps=mtp.eps,
                num_auxiliary=depth,
            )


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
    """All but routers' correction biases, which no gradient holds against the decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "correction_bias" not in jax.tree_util.keystr(path), params
    )
