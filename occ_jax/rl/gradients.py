"""Gradients of one mini-batch, and the sums that estimators need of them.

One forward pass through the trunk, always. With λ known beforehand (fixed, or of an earlier update)
the cotangents of all heads are added and pulled back *once*; where λ follows from gradients of this
update, the trunk's pullback runs once for the policy loss and once a module.

All stops of gradients are in this file. The modules' forward pass runs once, and so
does the output head on their states; the two pullbacks give cotangents of θ (output head;
embedding), φ and the trunk's states. The auxiliary losses train the trunk: their cotangent of φ is
dropped. The head losses train the modules: all but their cotangent of φ is dropped. Nothing that is
dropped is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from occ_jax.config import Config
from occ_jax.models.model import Model
from occ_jax.models.responses import auxiliary_masks, trunk_states
from occ_jax.parallel.sharding import micro_batches
from occ_jax.rl.objective import (
    Denominators,
    MainMetrics,
    MainOutput,
    ModuleBatch,
    ModuleMetrics,
    distillation,
    log_prob_changes,
    main_loss,
    mini_batch_denominators,
    module_losses,
    module_metrics,
    module_scores,
    module_states,
)
from occ_jax.rl.regime import (
    active_estimator,
    auxiliary_loss,
    head_weights,
    micro_batch_sums,
    needs_separate_gradients,
)
from occ_jax.types import Batch, Params


class Gradients(NamedTuple):
    """Sums over micro-batches; every field adds up. None: the regime has no such thing."""

    trunk: Params  # g, or g + Σ_k λ_k h_k where all were pulled back together
    mtp: Params  # of the head losses; {} without modules
    main: MainMetrics
    expert_load: Float[Array, "L E"]  # tokens sent to each expert of each layer
    modules: ModuleMetrics | None = None
    auxiliary_loss: Float[Array, " K"] | None = None  # L_aux,k
    auxiliary: list[Params] | None = None  # h_k, where they were pulled back separately
    estimator_sums: Any = None  # `regime.micro_batch_sums`, where c and v² are measured


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
        coefficient: λ as known beforehand, ignored where it follows from gradients of this update.
        measure: whether c and v² are measured at this update.
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
    """One forward pass, then pullbacks: of the head losses to φ, of L_RL and L_aux,k to θ."""
    theta, depth = params["trunk"], model.config.num_mtp_modules
    trunk = _run_trunk(model, theta, batch)
    loss, main_pullback, main = jax.vjp(
        lambda theta, hidden: main_loss(model, config, theta, hidden, batch, denominators),
        theta,
        trunk.hidden,
        has_aux=True,
    )
    direct, d_hidden = main_pullback(jnp.ones_like(loss))
    if depth == 0:
        return Gradients(trunk.pull(direct, d_hidden), {}, main.metrics, trunk.expert_load)

    masks = auxiliary_masks(batch.valid, batch.response_mask, depth)
    rows = ModuleBatch(batch, masks, denominators.auxiliary)
    modules = _run_modules(model, config, params, trunk.mtp_input, batch)
    d_states = _head_cotangents(model, config, theta, modules, rows, main, coefficient)
    kind, estimator = auxiliary_loss(config), active_estimator(config, measure=measure)
    losses = auxiliary = sums = None
    if kind is None:
        gradient = trunk.pull(direct, d_hidden)
    else:
        losses, losses_pullback = jax.vjp(
            lambda log_probs: module_losses(config, kind, log_probs, rows), modules.log_probs
        )
        if needs_separate_gradients(estimator):
            gradient = trunk.pull(direct, d_hidden)
            each = [modules.through(*losses_pullback(unit)) for unit in jnp.eye(depth)]
            auxiliary = [trunk.pull(theta_k, d_input=input_k) for theta_k, input_k in each]
        else:
            of_modules, d_input = modules.through(*losses_pullback(coefficient))
            together = jax.tree.map(jnp.add, direct, of_modules)
            gradient = trunk.pull(together, d_hidden, d_input)
    if estimator is not None:
        changes = log_prob_changes(config, main, modules.log_probs, rows)
        sums = micro_batch_sums(estimator, gradient, auxiliary, changes)
    return Gradients(
        trunk=gradient,
        mtp=modules.pull_states(d_states)[1],
        main=main.metrics,
        expert_load=trunk.expert_load,
        modules=module_metrics(modules.log_probs, modules.best, main, masks),
        auxiliary_loss=losses,
        auxiliary=auxiliary,
        estimator_sums=sums,
    )


class _Trunk(NamedTuple):
    """Forward pass of the trunk, with its pullback."""

    hidden: Float[Array, "B columns D"]  # read by the main head
    mtp_input: Float[Array, "B columns D"]  # read by the first module
    expert_load: Float[Array, "L E"]  # read by metrics alone
    pullback: Callable[[tuple[Array, Array]], tuple[Params]]

    def pull(
        self, direct: Params, d_hidden: Array | None = None, d_input: Array | None = None
    ) -> Params:
        """Gradient of θ from a head's own gradient and its cotangents of the states (None: 0)."""
        (through,) = self.pullback(
            (
                jnp.zeros_like(self.hidden) if d_hidden is None else d_hidden,
                jnp.zeros_like(self.mtp_input) if d_input is None else d_input,
            )
        )
        return jax.tree.map(jnp.add, direct, through)


def _run_trunk(model: Model, theta: Params, batch: Batch) -> _Trunk:
    def run(theta: Params) -> tuple[tuple[Array, Array], Float[Array, "L E"]]:
        states = trunk_states(model, theta, batch.tokens, batch.valid)
        return (states.hidden, states.mtp_input), states.expert_load

    (hidden, mtp_input), pullback, expert_load = jax.vjp(run, theta, has_aux=True)
    return _Trunk(hidden, mtp_input, expert_load, pullback)


class _Modules(NamedTuple):
    """Forward pass of the modules, with the pullbacks of its two parts."""

    states: Float[Array, "K B R D"]
    log_probs: Float[Array, "K B R"]
    best: Int[Array, "K B R"]  # the most probable tokens
    # From a cotangent of `states` to those of θ (embedding), φ and the trunk's states.
    pull_states: Callable[[Array], tuple[Params, Params, Array]]
    # From a cotangent of `log_probs` to those of θ (output head) and `states`.
    pull_scores: Callable[[Array], tuple[Params, Array]]

    def through(self, d_log_probs: Array) -> tuple[Params, Array]:
        """Gradient of θ's output head and embedding, and cotangent of the trunk's states."""
        of_head, d_states = self.pull_scores(d_log_probs)
        of_embedding, _, d_input = self.pull_states(d_states)
        return jax.tree.map(jnp.add, of_head, of_embedding), d_input


def _run_modules(
    model: Model, config: Config, params: Params, mtp_input: Array, batch: Batch
) -> _Modules:
    theta = params["trunk"]
    states, pull_states = jax.vjp(
        lambda theta, phi, mtp_input: module_states(
            model, {"trunk": theta, "mtp": phi}, mtp_input, batch
        ),
        theta,
        params["mtp"],
        mtp_input,
    )
    log_probs, pull_scores, best = jax.vjp(
        lambda theta, states: module_scores(model, config, theta, states, batch),
        theta,
        states,
        has_aux=True,
    )
    return _Modules(states, log_probs, best, pull_states, pull_scores)


def _head_cotangents(
    model: Model,
    config: Config,
    theta: Params,
    modules: _Modules,
    rows: ModuleBatch,
    main: MainOutput,
    coefficient: Float[Array, " K"],
) -> Float[Array, "K B R D"]:
    """Cotangent of the modules' states from the weighted sum of the head losses."""
    weights, kind = head_weights(config, coefficient), config.mtp.head_loss
    match kind:
        case "distill":
            return jax.grad(
                lambda states: (
                    weights @ distillation(model, config, theta, states, main.hidden, rows)
                )
            )(modules.states)
        case "ce" | "policy":
            d_log_probs = jax.grad(
                lambda log_probs: weights @ module_losses(config, kind, log_probs, rows)
            )(modules.log_probs)
            return modules.pull_scores(d_log_probs)[1]
