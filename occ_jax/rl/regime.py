"""Regimes and estimators: every answer that depends on `mtp.regime` or `mtp.estimator`.

A regime says which loss of the modules trains the trunk, and who sets its coefficient λ. Under
regime occ an estimator says how c_k = <g, h_k> and G_kl = <h_k, h_l> (of one module: c and v²) are
measured. A new one is a name in `occ_jax.config`, with the checks of its settings, and a case in
the matches below.

The losses themselves are in `objective`, the pullbacks in `gradients`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from occ_jax.calibration import (
    Statistics,
    calibrate_auxiliary,
    cross_batch_statistics,
    fixed_auxiliary,
    inner_product_statistics,
    log_prob_statistics,
)
from occ_jax.config import Config, Estimator
from occ_jax.types import Params


class LogProbChanges(NamedTuple):
    """Changes of log-probabilities since the rollout, in one micro-batch."""

    main: Float[Array, "B R"]
    modules: Float[Array, "K B R"]
    masks: Bool[Array, "K B R"]  # tokens that count


def active_estimator(config: Config, *, measure: bool = True) -> Estimator | None:
    """Estimator that measures c and v² at an update; None where nothing is measured.

    Args:
        config: regime and estimator.
        measure: False for an update between measurements (`mtp.measure_every`).
    """
    match config.mtp.regime:
        case "detach" | "ce" | "policy":
            return None
        case "occ":
            return config.mtp.estimator if measure else None


def label(config: Config) -> str:
    """Name of the run's kind in tables and figures, such as "detach" or "occ/log_prob"."""
    estimator = active_estimator(config)
    return config.mtp.regime if estimator is None else f"{config.mtp.regime}/{estimator}"


def auxiliary_loss(config: Config) -> Literal["ce", "policy"] | None:
    """Loss of a module that trains the trunk; None where the module's gradient stops there."""
    match config.mtp.regime:
        case "detach":
            return None
        case "ce":
            return "ce"
        case "policy" | "occ":
            return "policy"


def scores_modules(config: Config) -> bool:
    """Whether the losses read the modules' log-probabilities under the old policy."""
    return (
        config.model.num_mtp_modules > 0
        and config.mtp.auxiliary_ratio == "own"
        and "policy" in (auxiliary_loss(config), config.mtp.head_loss)
    )


def head_weights(config: Config, coefficient: Float[Array, " K"]) -> Float[Array, " K"]:
    """Weight of every head loss.

    As published, the module sees the policy loss with the trunk's λ on it. Head loss "policy" does
    so where the trunk has that loss too; every other head loss has weight 1.
    """
    shared = auxiliary_loss(config) == config.mtp.head_loss == "policy"
    return coefficient if shared else jnp.ones_like(coefficient)


def calibration(config: Config) -> optax.GradientTransformationExtraArgs:
    """First transformation of the trunk's optimizer: sets λ, and adds λ_k h_k to g.

    It adds only gradients that were pulled back separately. Its state is the place for anything
    that an estimator remembers from update to update.
    """
    mtp, depth = config.mtp, config.model.num_mtp_modules
    match mtp.regime:
        case "detach":
            return optax.with_extra_args_support(optax.identity())
        case "ce" | "policy":
            return fixed_auxiliary(mtp.coefficient, num_auxiliary=depth)
        case "occ":
            return calibrate_auxiliary(
                mtp.scale, decay=mtp.decay, bounds=mtp.bounds, eps=mtp.eps, num_auxiliary=depth
            )


def current_coefficient(config: Config, opt_state: Any) -> Float[Array, " K"]:
    """λ in the trunk's optimizer state; zeros where no loss of a module trains the trunk."""
    if auxiliary_loss(config) is None:
        return jnp.zeros(config.model.num_mtp_modules)
    coefficient: Any = optax.tree_utils.tree_get(opt_state, "coefficient")
    return coefficient


def needs_separate_gradients(estimator: Estimator | None) -> bool:
    """Whether g and every h_k are pulled back separately, and λ follows from this update's."""
    match estimator:
        case "exact" | "cross_batch":
            return True
        case "log_prob" | None:
            return False


def micro_batch_sums(
    estimator: Estimator, gradient: Params, auxiliary: list[Params] | None, changes: LogProbChanges
) -> Any:
    """Arrays that the estimator adds up over micro-batches, beside the gradients.

    Args:
        estimator: `active_estimator` of this update.
        gradient: g of one micro-batch, with λ_k h_k in it where gradients are not separate.
        auxiliary: h_k of one micro-batch, where they are separate.
        changes: of log-probabilities.
    """
    match estimator:
        case "exact":
            return ()
        case "cross_batch":
            return inner_product_statistics(gradient, auxiliary).correlation
        case "log_prob":
            return log_prob_statistics(*changes)


def statistics(
    config: Config,
    estimator: Estimator | None,
    gradient: Params,
    auxiliary: list[Params] | None,
    sums: Any,
) -> Statistics | None:
    """Measures c and G of one update; None where nothing is measured.

    Args:
        config: the number of micro-batches.
        estimator: `active_estimator` of this update.
        gradient: g of the mini-batch.
        auxiliary: h_k of the mini-batch, where they are separate.
        sums: `micro_batch_sums`, added up.
    """
    match estimator:
        case None:
            return None
        case "exact":
            return inner_product_statistics(gradient, auxiliary)
        case "cross_batch":
            # Gradients of a micro-batch are divided by the mini-batch's denominator already, so
            # their sum is the mean of the estimator's g_m; both statistics are of degree two.
            count = config.algorithm.micro_batches
            measured = cross_batch_statistics(gradient, auxiliary, sums, count)
            return Statistics(*(count**2 * x for x in measured))
        case "log_prob":
            return sums
