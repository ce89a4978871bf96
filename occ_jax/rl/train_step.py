"""One update: gradients, statistics, calibration, optimizer, metrics. Pure.

    forward -> losses (sum, denominator) -> gradients g, h_k -> statistics (c, G)
            -> optax chain: calibration -> clip -> adamw -> new state

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
from occ_jax.config import Config
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import abstract, state_shardings
from occ_jax.rl.gradients import Gradients, mini_batch_gradients
from occ_jax.rl.objective import MainMetrics, ModuleMetrics
from occ_jax.rl.optimizer import learning_rate_schedule, make_optimizer
from occ_jax.rl.regime import active_estimator, current_coefficient, statistics
from occ_jax.types import Batch, Params, TrainState

Metrics = dict[str, Array]

# Smallest divisor of a ratio. Only what is 0 lies below it: the ratio is 0 there instead of NaN.
_TINY = 1e-30


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
    model: Model, config: Config, state: TrainState, batch: Batch, *, measure: bool = True
) -> tuple[TrainState, Metrics]:
    """One update of trunk and modules.

    Args:
        model: the architecture.
        config: everything else that is static.
        state: parameters, optimizer state (the coefficient in it), update count, key.
        batch: one mini-batch.
        measure: whether c and v² are measured; False on the updates between, see
            `mtp.measure_every`.

    Returns:
        The next state and float32 scalars. A non-finite loss or gradient leaves parameters and
        optimizer state as they were and sets metric "actor/skipped" to 1.
    """
    before = current_coefficient(config, state.opt_state["trunk"])
    gradients = mini_batch_gradients(model, config, state.params, batch, before, measure=measure)
    measured = statistics(
        config,
        active_estimator(config, measure=measure),
        gradients.trunk,
        gradients.auxiliary,
        gradients.estimator_sums,
    )
    updates, opt_state = make_optimizer(config).update(
        {"trunk": gradients.trunk, "mtp": gradients.mtp},
        state.opt_state,
        state.params,
        auxiliary_updates=gradients.auxiliary,
        statistics=measured,
    )
    norms = {"actor/grad_norm": _norm(gradients.trunk), "mtp/grad_norm": _norm(gradients.mtp)}
    finite = jnp.isfinite(gradients.main.loss)
    for norm in norms.values():
        finite &= jnp.isfinite(norm)
    params = _where(finite, optax.apply_updates(state.params, updates), state.params)
    opt_state = _where(finite, opt_state, state.opt_state)
    after = current_coefficient(config, opt_state["trunk"])
    metrics = {
        "actor/loss": gradients.main.loss,
        "actor/pg_loss": gradients.main.policy_loss,
        "actor/lr": jnp.asarray(learning_rate_schedule(config)(state.step), jnp.float32),
        "actor/skipped": 1.0 - finite.astype(jnp.float32),
        **norms,
        **_token_metrics(gradients.main),
        **_module_metrics(gradients.modules),
        **_expert_metrics(gradients.expert_load),
        **_calibration_metrics(config, gradients, measured, before, after),
    }
    return TrainState(params, opt_state, state.step + 1, state.key), metrics


def _norm(tree: Any) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(optax.tree.cast(tree, jnp.float32)), jnp.float32)


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def _token_metrics(main: MainMetrics) -> Metrics:
    """Means over trained tokens, under the names that users of verl know."""
    sums = main.token_sums
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


def _module_metrics(modules: ModuleMetrics | None) -> Metrics:
    if modules is None:
        return {}
    tokens = jnp.maximum(modules.tokens, 1.0)
    return {
        **_per_module("mtp_losses/mtp_{}_loss", modules.cross_entropy / tokens),
        **_per_module("mtp/agreement_{}", modules.agreement / tokens),
    }


def _expert_metrics(load: Float[Array, "L E"]) -> Metrics:
    """Unevenness of the experts' loads.

    Violation = busiest / mean - 1 of a layer's experts (MaxVio of arXiv 2408.15664): 0 is even.
    """
    if load.size == 0:
        return {}
    mean = jnp.maximum(jnp.mean(load, axis=1), _TINY)
    violation = jnp.max(load, axis=1) / mean - 1.0
    return {
        "moe/max_violation_mean": jnp.mean(violation),
        "moe/max_violation_max": jnp.max(violation),
        "moe/idle_experts": jnp.mean(load == 0, dtype=jnp.float32),
    }


def _calibration_metrics(
    config: Config,
    gradients: Gradients,
    measured: Statistics | None,
    before: Float[Array, " K"],
    after: Float[Array, " K"],
) -> Metrics:
    """λ as used, c and G of this update, and the gain that the theory expects from them.

    Args:
        config: the scale λ₊.
        gradients: of the update.
        measured: c and G, None where nothing was measured.
        before: λ before the update.
        after: λ after it.
    """
    if gradients.auxiliary_loss is None:
        return {}
    applied, metrics = before, _per_module("mtp/policy_loss_{}", gradients.auxiliary_loss)
    if measured is not None and gradients.auxiliary is not None:
        # The optimizer took the main gradient alone where the measurement was not finite.
        applied = jnp.where(_non_finite(measured) == 0, after, 0.0)
        norm = _norm(gradients.trunk)
        norms = jnp.stack([_norm(tree) for tree in gradients.auxiliary])
        # On one batch, whatever the estimator: between different micro-batches it is no cosine.
        inner = inner_product_statistics(gradients.trunk, gradients.auxiliary).correlation
        metrics |= _per_module("occ/cosine_{}", inner / jnp.maximum(norm * norms, _TINY))
        ratios = jnp.abs(applied) * norms / jnp.maximum(norm, _TINY)
        metrics |= _per_module("occ/step_ratio_{}", ratios)
    metrics |= _per_module("occ/coefficient_{}", applied)
    if measured is None:
        return metrics
    metrics |= _per_module("occ/correlation_{}", measured.correlation)
    for row in range(len(applied)):
        for column in range(row, len(applied)):
            metrics[f"occ/penalty_{row + 1}_{column + 1}"] = measured.penalty[row, column]
    gain = config.mtp.scale * applied @ measured.correlation
    cost = 0.5 * applied @ measured.penalty @ applied
    metrics["occ/predicted_gain"] = gain - cost
    metrics["occ/non_finite"] = _non_finite(measured)
    return metrics


def _non_finite(statistics: Statistics) -> Float[Array, ""]:
    finite = [jnp.all(jnp.isfinite(x)) for x in statistics]
    return 1.0 - (finite[0] & finite[1]).astype(jnp.float32)


def _per_module(name: str, values: Float[Array, " K"]) -> Metrics:
    return {name.format(k + 1): values[k] for k in range(len(values))}
