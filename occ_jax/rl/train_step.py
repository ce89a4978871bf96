# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false
"""One update: gradients, statistics, calibration, optimizer, metrics. Pure.

    forward -> losses (sum, denominator) -> gradients g, h_k -> statistics (c, G)
            -> optax chain: calibrate_auxiliary -> clip -> adamw -> new state

`train_step` is a function of (state, batch) and two static things; `occ_jax.programs` compiles it.
There are two compiled kinds, with and without a measurement of c and v²; the caller picks by the
update's number, so nothing is decided on device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from occ_jax.calibration import Statistics, inner_product_statistics
from occ_jax.calibration.estimators import cross_batch_statistics
from occ_jax.config import Config
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import abstract, state_shardings
from occ_jax.rl.gradients import Gradients, apart, mini_batch_gradients
from occ_jax.rl.optimizer import current_coefficient, learning_rate_schedule, make_optimizer
from occ_jax.types import Batch, Params, TrainState

Metrics = dict[str, Array]


def init_state(config: Config, params: Params, seed: int) -> TrainState:
    """The state before the first update, unplaced (`place_state` puts it on a mesh)."""
    return TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
    )


def abstract_state(model: Model, config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_state(config, model.init(jax.random.key(0)), 0))
    return abstract(mesh, shapes)


def place_state(config: Config, params: Params, seed: int, mesh: Mesh) -> TrainState:
    """`init_state` on a mesh, every leaf in a buffer of its own, so that it can be donated.

    `params` are donated: where they lie on the mesh already they are not copied.
    """
    shapes = jax.eval_shape(lambda p: init_state(config, p, seed), params)
    place = jax.jit(
        lambda p: init_state(config, p, seed),
        out_shardings=state_shardings(mesh, shapes),
        donate_argnums=0,
    )
    return place(params)


def train_step(
    model: Model,
    config: Config,
    state: TrainState,
    batch: Batch,
    *,
    measure: bool = True,
) -> tuple[TrainState, Metrics]:
    """One update of trunk and modules.

    Args:
        model: the architecture.
        config: everything else that is static.
        state: parameters, optimizer state (the coefficient in it), update count, key.
        batch: one mini-batch.
        measure: whether c and v^2 are measured; False on the updates between, see
            `mtp.measure_every`.

    Returns:
        The next state and float32 scalars. A non-finite loss or gradient leaves parameters and
        optimizer state as they were and sets metric "actor/skipped" to 1.
    """
    before = current_coefficient(config, state.opt_state)
    gradients = mini_batch_gradients(model, config, state.params, batch, before, measure=measure)
    statistics = _statistics(config, gradients, measure=measure)
    updates, opt_state = make_optimizer(config).update(
        {"trunk": gradients.trunk, "mtp": gradients.mtp},
        state.opt_state,
        state.params,
        auxiliary_updates=gradients.auxiliary or None,
        statistics=statistics,
    )
    norms = {
        "actor/grad_norm": _norm(gradients.trunk),
        "mtp/grad_norm": _norm(gradients.mtp),
    }
    finite = jnp.isfinite(gradients.loss)
    for norm in norms.values():
        finite &= jnp.isfinite(norm)
    params = _where(finite, optax.apply_updates(state.params, updates), state.params)
    opt_state = _where(finite, opt_state, state.opt_state)
    metrics = {
        "actor/pg_loss": gradients.loss,
        "actor/lr": jnp.asarray(learning_rate_schedule(config)(state.step), jnp.float32),
        "actor/skipped": 1.0 - finite.astype(jnp.float32),
        **norms,
        **_token_metrics(gradients),
        **_head_metrics(gradients),
        **_expert_metrics(gradients.expert_load),
        **_calibration_metrics(config, gradients, statistics, opt_state, measure=measure),
    }
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


def _statistics(config: Config, gradients: Gradients, *, measure: bool) -> Statistics | None:
    """c and G of this update, None where nothing was measured (or nothing is to be)."""
    if not measure or config.mtp.regime != "occ":
        return None
    match config.mtp.estimator:
        case "exact":
            return inner_product_statistics(gradients.trunk, gradients.auxiliary)
        case "cross_batch":
            # Micro-batch gradients are already divided by the mini-batch's denominator, so their
            # sum is the mean of what the estimator calls g_m; both statistics are of degree two.
            count = config.algorithm.micro_batches
            statistics = cross_batch_statistics(
                gradients.trunk, gradients.auxiliary, gradients.within, count
            )
            return Statistics(*(count**2 * x for x in statistics))
        case "log_prob":
            return gradients.proxy
        case "released":
            return None


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(optax.tree.cast(tree, jnp.float32)), jnp.float32)


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _token_metrics(gradients: Gradients) -> Metrics:
    """Means over trained tokens, under the names verl's users know."""
    sums = gradients.metrics
    tokens = jnp.maximum(sums["tokens"], 1.0)
    names = {
        "approx_kl": "actor/ppo_kl",
        "ratio": "actor/ratio",
        "clip_fraction_low": "actor/pg_clipfrac_low",
        "clip_fraction_high": "actor/pg_clipfrac_high",
        "clip_fraction_dual": "actor/pg_clipfrac_dual",
        "entropy": "actor/entropy",
        "reference_kl": "actor/kl_loss",
    }
    return {names[name]: value / tokens for name, value in sums.items() if name != "tokens"}


def _head_metrics(gradients: Gradients) -> Metrics:
    heads = gradients.heads
    tokens = jnp.maximum(heads.tokens, 1.0)
    return {
        **_per_module("mtp_losses/mtp_{}_loss", heads.cross_entropy / tokens),
        **_per_module("mtp/agreement_{}", heads.agreement / tokens),
    }


def _expert_metrics(load: Float[Array, "L E"]) -> Metrics:
    """How unevenly routers spread tokens over experts.

    Violation = busiest / mean - 1 of a layer's experts (MaxVio of arXiv 2408.15664): 0 is even.
    """
    if load.size == 0:
        return {}
    mean = jnp.maximum(jnp.mean(load, axis=1), 1e-30)
    violation = jnp.max(load, axis=1) / mean - 1.0
    return {
        "moe/max_violation_mean": jnp.mean(violation),
        "moe/max_violation_max": jnp.max(violation),
        "moe/idle_experts": jnp.mean(load == 0, dtype=jnp.float32),
    }


def _calibration_metrics(
    config: Config,
    gradients: Gradients,
    statistics: Statistics | None,
    opt_state: Any,
    *,
    measure: bool,
) -> Metrics:
    """lambda used, c and G of this update, and what the theory makes of them."""
    if config.mtp.regime == "detach":
        return {}
    applied = gradients.applied
    metrics: Metrics = {}
    if apart(config, measure=measure):
        assert statistics is not None
        finite = _non_finite(statistics) == 0  # else the optimizer took the main gradient alone
        applied = jnp.where(finite, current_coefficient(config, opt_state), 0.0)
        norm = _norm(gradients.trunk)
        norms = jnp.stack([_norm(tree) for tree in gradients.auxiliary])
        # On one batch, whatever the estimator: with `within` removed it is not a cosine.
        inner = inner_product_statistics(gradients.trunk, gradients.auxiliary)
        metrics |= _per_module(
            "occ/cosine_{}", inner.correlation / jnp.maximum(norm * norms, 1e-30)
        )
        metrics |= _per_module(
            "occ/step_ratio_{}", jnp.abs(applied) * norms / jnp.maximum(norm, 1e-30)
        )
    metrics |= _per_module("occ/coefficient_{}", applied)
    metrics |= _per_module("mtp/policy_loss_{}", gradients.auxiliary_loss)
    if statistics is None:
        return metrics
    metrics |= _per_module("occ/correlation_{}", statistics.correlation)
    for row in range(len(applied)):
        for column in range(row, len(applied)):
            metrics[f"occ/penalty_{row + 1}_{column + 1}"] = statistics.penalty[row, column]
    gain = config.mtp.scale * applied @ statistics.correlation
    cost = 0.5 * applied @ statistics.penalty @ applied
    metrics["occ/predicted_gain"] = gain - cost
    metrics["occ/non_finite"] = _non_finite(statistics)
    return metrics


def _non_finite(statistics: Statistics) -> Float[Array, ""]:
    finite = [jnp.all(jnp.isfinite(x)) for x in statistics]
    return 1.0 - (finite[0] & finite[1]).astype(jnp.float32)


def _per_module(name: str, values: Float[Array, " K"]) -> Metrics:
    return {name.format(k + 1): values[k] for k in range(len(values))}
