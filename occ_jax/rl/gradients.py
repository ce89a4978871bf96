# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownLambdaType=false, reportUnknownParameterType=false
"""Gradients of one mini-batch and what the estimators need of them.

One forward pass through the trunk, always. With the coefficient known beforehand (fixed, or of an
earlier update) the cotangents of all heads are added and pulled back *once*; where c and v^2 are to
be measured exactly, the trunk's pullback runs once for the policy loss and once a module.

Where gradients stop is visible here and nowhere else. The modules' forward pass runs once, and so
does their reading by the output head; the two pullbacks give cotangents of theta (output head;
embedding), phi and the trunk's states. Of the auxiliary losses, which train the trunk, phi's is
dropped; of the head losses, which train the module, all but phi's. What is dropped is not computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from occ_jax.calibration import Statistics, inner_product_statistics
from occ_jax.calibration.estimators import log_prob_statistics
from occ_jax.config import Config
from occ_jax.models.model import Model
from occ_jax.models.scoring import auxiliary_masks, trunk_states
from occ_jax.parallel.sharding import micro_batches
from occ_jax.rl.objective import (
    Denominators,
    HeadMetrics,
    MainOutput,
    auxiliary_delta,
    auxiliary_losses,
    head_distillation,
    head_losses,
    head_metrics,
    main_loss,
    mini_batch_denominators,
    module_scores,
    module_states,
)
from occ_jax.types import Batch, Params


class Gradients(NamedTuple):
    """Sums over micro-batches; every field adds up."""

    trunk: Params  # of L_RL, or of L_RL + sum_k lambda_k L_aux,k when pulled back together
    auxiliary: list[Params]  # of each L_aux,k when pulled back apart, else empty
    mtp: dict[int, Params]  # of the head losses
    within: Float[Array, " K"]  # sum_m <g_m, h_mk>, for cross_batch alone
    proxy: Statistics  # of log-probabilities, 0 unless the estimator asks
    loss: Float[Array, ""]  # L_RL
    auxiliary_loss: Float[Array, " K"]
    applied: Float[Array, " K"]  # the coefficient used, averaged over micro-batches
    metrics: dict[str, Float[Array, ""]]  # main head, sums over tokens
    heads: HeadMetrics
    expert_load: Float[Array, "L E"]  # tokens that each expert of each layer was sent


def apart(config: Config, *, measure: bool) -> bool:
    """Whether this update needs g and h_k as separate gradients."""
    return measure and config.mtp.regime == "occ" and config.mtp.estimator in _BY_GRADIENT


_BY_GRADIENT = ("exact", "cross_batch")


def mini_batch_gradients(
    model: Model,
    config: Config,
    params: Params,
    batch: Batch,
    coefficient: Float[Array, " K"],
    *,
    measure: bool,
) -> Gradients:
    """Accumulates `Gradients` over the micro-batches by a scan.

    Args:
        model: the architecture.
        config: losses, regime, estimator, number of micro-batches M.
        params: trunk and modules.
        batch: the mini-batch; rows of one prompt are neighbours, so no group is split.
        coefficient: lambda known beforehand, ignored where c and v^2 are measured exactly.
        measure: whether c and v^2 are measured at this update.
    """
    denominators = mini_batch_denominators(config, batch, model.config.num_mtp_modules)

    def one(piece: Batch) -> Gradients:
        return _micro_batch_gradients(
            model, config, params, piece, denominators, coefficient, measure=measure
        )

    count = config.algorithm.micro_batches
    if count == 1:
        return one(batch)
    pieces = micro_batches(batch, count)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    # Sums of bfloat16 gradients are kept in float32 until they are whole.
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    total, _ = jax.lax.scan(
        lambda sums, piece: (jax.tree.map(jnp.add, sums, one(piece)), None), zeros, pieces
    )
    total = total._replace(applied=total.applied / count)
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), total, shapes)


def _micro_batch_gradients(
    model: Model,
    config: Config,
    params: Params,
    batch: Batch,
    denominators: Denominators,
    coefficient: Float[Array, " K"],
    *,
    measure: bool,
) -> Gradients:
    theta, phi, depth = params["trunk"], params["mtp"], model.config.num_mtp_modules
    (hidden, mtp_input), trunk_pullback, expert_load = jax.vjp(
        lambda theta: _trunk_states(model, theta, batch), theta, has_aux=True
    )
    no_hidden, no_input = jnp.zeros_like(hidden), jnp.zeros_like(mtp_input)

    def pull(direct: Params, d_hidden: Array, d_input: Array) -> Params:
        """Gradient of theta from a head's own gradient and its cotangents of the trunk states."""
        (through,) = trunk_pullback((d_hidden, d_input))
        return jax.tree.map(jnp.add, direct, through)

    loss, main_pullback, main = jax.vjp(
        lambda theta, hidden: main_loss(model, config, theta, hidden, batch, denominators),
        theta,
        hidden,
        has_aux=True,
    )
    direct, d_hidden = main_pullback(jnp.ones_like(loss))
    gradients = _nothing(depth)._replace(loss=loss, metrics=main.metrics, expert_load=expert_load)
    if depth == 0:
        return gradients._replace(trunk=pull(direct, d_hidden, no_input))

    states, modules_pullback = jax.vjp(
        lambda theta, phi, mtp_input: module_states(
            model, {"trunk": theta, "mtp": phi}, mtp_input, batch
        ),
        theta,
        phi,
        mtp_input,
    )
    log_probs, read_pullback, best = jax.vjp(
        lambda theta, states: module_scores(model, config, theta, states, batch),
        theta,
        states,
        has_aux=True,
    )
    # Of the head losses' cotangents only phi's is kept, of the auxiliary losses' all but phi's.
    weights = _head_weights(config, coefficient)
    if config.mtp.head_loss == "distill":
        d_states = jax.grad(
            lambda states: (
                weights @ head_distillation(model, config, theta, states, batch, denominators, main)
            )
        )(states)
    else:
        d_log_probs = jax.grad(
            lambda log_probs: weights @ head_losses(config, log_probs, batch, denominators, main)
        )(log_probs)
        d_states = read_pullback(d_log_probs)[1]
    gradients = gradients._replace(
        mtp=modules_pullback(d_states)[1], heads=head_metrics(log_probs, best, batch, main)
    )
    if config.mtp.regime == "detach":
        return gradients._replace(trunk=pull(direct, d_hidden, no_input))

    losses, losses_pullback, inside = jax.vjp(
        lambda log_probs: auxiliary_losses(
            config, log_probs, batch, denominators, main.scores.log_probs
        ),
        log_probs,
        has_aux=True,
    )

    def through_modules(weights: Float[Array, " K"]) -> tuple[Params, Array]:
        """Gradient of theta's embedding and head, and cotangent of the states, of w @ L_aux."""
        of_head, d_states = read_pullback(*losses_pullback(weights))
        of_embedding, _, d_input = modules_pullback(d_states)
        return jax.tree.map(jnp.add, of_head, of_embedding), d_input

    gradients = gradients._replace(
        auxiliary_loss=losses, proxy=_proxy(config, main, log_probs, batch, measure=measure)
    )
    if apart(config, measure=measure):
        trunk = pull(direct, d_hidden, no_input)
        each = [through_modules(unit) for unit in jnp.eye(depth)]
        separate = [pull(theta_k, no_hidden, input_k) for theta_k, input_k in each]
        gradients = gradients._replace(trunk=trunk, auxiliary=separate)
        if config.mtp.estimator == "exact":
            return gradients
        within = inner_product_statistics(trunk, separate).correlation
        return gradients._replace(within=within)
    # The released code's coefficient is inside the losses already.
    weights = coefficient if not _released(config) else jnp.ones(depth)
    auxiliary_direct, d_input = through_modules(weights)
    together = jax.tree.map(jnp.add, direct, auxiliary_direct)
    return gradients._replace(trunk=pull(together, d_hidden, d_input), applied=weights * inside)


def _trunk_states(
    model: Model, theta: Params, batch: Batch
) -> tuple[tuple[Array, Array], Float[Array, "L E"]]:
    """What the heads read, and what only metrics do."""
    states = trunk_states(model, theta, batch.tokens, batch.valid)
    return (states.hidden, states.mtp_input), states.expert_load


def _nothing(depth: int) -> Gradients:
    """What a field holds that a regime does not fill."""
    return Gradients(
        trunk={},
        auxiliary=[],
        mtp={},
        within=jnp.zeros(depth),
        proxy=Statistics(jnp.zeros(depth), jnp.zeros((depth, depth))),
        loss=jnp.zeros(()),
        auxiliary_loss=jnp.zeros(depth),
        applied=jnp.zeros(depth),
        metrics={},
        heads=HeadMetrics(*(jnp.zeros(depth) for _ in HeadMetrics._fields)),
        expert_load=jnp.zeros((0, 0)),
    )


def _released(config: Config) -> bool:
    return config.mtp.regime == "occ" and config.mtp.estimator == "released"


def _head_weights(config: Config, coefficient: Float[Array, " K"]) -> Float[Array, " K"]:
    """Weight of every head loss.

    As published the head sees the policy loss with the trunk's coefficient on it; where there is
    one (regimes policy and occ), so does head loss "policy". The other losses have weight 1.
    """
    scaled = config.mtp.head_loss == "policy" and config.mtp.regime in ("policy", "occ")
    return coefficient if scaled and not _released(config) else jnp.ones_like(coefficient)


def _proxy(
    config: Config,
    main: MainOutput,
    log_probs: Float[Array, "K B R"],
    batch: Batch,
    *,
    measure: bool,
) -> Statistics:
    """The log-probability statistics of one micro-batch (zeros for every other estimator)."""
    depth = len(log_probs)
    if not (measure and config.mtp.regime == "occ" and config.mtp.estimator == "log_prob"):
        return Statistics(jnp.zeros(depth), jnp.zeros((depth, depth)))
    return log_prob_statistics(
        main.scores.log_probs - batch.old_log_probs,
        auxiliary_delta(config, log_probs, batch),
        auxiliary_masks(batch.valid, batch.response_mask, depth),
    )
