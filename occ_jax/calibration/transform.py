"""Calibrated auxiliary gradients: the optax transformation and the closed-form optimum behind it.

Owns the weights λ of K auxiliary gradients h_k that are added to a main gradient g: the inner
products that measure them, the bound that they maximise, and the optimizer state that carries them
from step to step. Knows nothing of language models or reinforcement learning. Leaves other
measurements of the same two statistics to `occ_jax.calibration.estimators`, and clipping,
preconditioning and the learning rate to the transformations that follow in the chain.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

_Leaves = list[Any]  # arrays in the order of the leaves of `updates`, None where a tree has none
_Bounds = Sequence[Any] | None  # (lo, hi)

# Eigenvalues below this share of the largest one are rounding noise: an inner product summed in
# float32 over many parameters is right to about 1e-6, and the matrix has a unit diagonal.
_RANK_TOLERANCE = 1e-5


class Statistics(NamedTuple):
    """The two statistics that give λ, of loss gradients or of ascent directions: signs cancel."""

    correlation: jax.Array  # shape=[K], dtype=jnp.float32: c_k = <g, h_k>
    penalty: jax.Array  # shape=[K, K], dtype=jnp.float32: G_kl = <h_k, h_l>


class CalibrationState(NamedTuple):
    """State of `calibrate_auxiliary`; the EMAs are stored debiased, so read them as they are."""

    count: jax.Array  # shape=(), dtype=jnp.int32: finite measurements so far
    coefficient: jax.Array  # shape=[K], dtype=jnp.float32: λ
    correlation: jax.Array  # shape=[K], dtype=jnp.float32: EMA of c
    penalty: jax.Array  # shape=[K, K], dtype=jnp.float32: EMA of G


class FixedAuxiliaryState(NamedTuple):
    """State of `fixed_auxiliary`."""

    count: jax.Array  # shape=(), dtype=jnp.int32: updates so far
    coefficient: jax.Array  # shape=[K], dtype=jnp.float32: λ of the next update


def calibrate_auxiliary(
    scale: Any = 1.0,
    *,
    decay: Any = 0.0,
    bounds: _Bounds = None,
    eps: Any = 1e-8,
    num_auxiliary: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds auxiliary gradients to the main one, each weighted by its use for the main loss.

    A step along :math:`g + \sum_k \lambda_k h_k` is better for the main loss than a step along
    :math:`g` by at least an amount that is concave in λ. With its unknown constants in one `scale`,
    that bound is

    .. math:: \Delta(\lambda) = \mathrm{scale}\; c^\top \lambda - \tfrac12 \lambda^\top G \lambda,
      \qquad c_k = \langle g, h_k \rangle, \quad G_{kl} = \langle h_k, h_l \rangle,

    and its maximum is at :math:`\lambda^* = \mathrm{scale}\,(G + \epsilon I)^{-1} c`; for K = 1
    this is :math:`\mathrm{scale}\, c / (\|h\|^2 + \epsilon)`. A negative λ reverses a harmful
    direction. The result is :math:`g + \sum_k \lambda^*_k h_k`, in the dtype of :math:`g`.

    The update function takes two optional keywords and ignores all others:

    * ``auxiliary_updates``: one pytree like ``updates`` (K = 1), or a list or tuple of K of them.
      ``None`` in place of a leaf or a subtree marks parameters this auxiliary loss does not share.
    * ``statistics``: a :class:`Statistics` of your own that replaces the inner products. Without
      ``auxiliary_updates`` it only advances λ: a step with a single backward pass reads λ first,
      multiplies its auxiliary loss by it, and passes the measurement here.

    Without both, updates and state pass through unchanged. A measurement that is not finite leaves
    the state as it was, and the step gets nothing from the auxiliary gradients.

    Put it first in a chain: after clipping or preconditioning, c no longer describes the losses.
    Read λ from the state of a chain by ``optax.tree_utils.tree_get(opt_state, "coefficient")``.
    To accumulate gradients over micro-batches, add up both kinds before the update:
    ``optax.MultiSteps`` adds up ``updates`` only.

    Args:
        scale: Positive factor on λ. The value 1 fits one step size; a larger step needs a smaller
            factor.
        decay: Decay of the EMAs of c and G, in [0, 1). With 0, λ comes from one measurement alone.
        bounds: Smallest and largest λ; either may be infinite. For K > 1, λ maximises the bound
            inside the box, which is not the same as clipping the unconstrained maximiser.
        eps: Positive regulariser of G, in units of a squared gradient norm.
        num_auxiliary: K, a static int. With ``None`` the state starts with K = 1, and the first
            update with another K replaces it by a new one: new shapes, so one retrace. Pass K > 1
            inside ``lax.scan``, for a state to be restored from a checkpoint, and in
            ``static_args`` of ``optax.inject_hyperparams``.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs` with a :class:`CalibrationState`.

    Raises:
        ValueError: An argument is out of range; on update, auxiliary gradients or statistics have a
            structure, shapes or a number that does not fit.

    Example:
        Both losses pull ``w[0]`` to 1, but they disagree about ``w[1]``. The auxiliary gradient
        counts in full while it agrees with the main one, and no longer when it does not.

        >>> import jax, jax.numpy as jnp, optax
        >>> from occ_jax.calibration import calibrate_auxiliary
        >>> def main_loss(w):
        ...     return 0.5 * jnp.sum((w - jnp.array([1.0, 2.0])) ** 2)
        >>> def auxiliary_loss(w):
        ...     return 0.5 * jnp.sum((w - jnp.array([1.0, 0.0])) ** 2)
        >>> calibration = calibrate_auxiliary(bounds=(0.0, 1.0))
        >>> tx = optax.chain(calibration, optax.clip_by_global_norm(10.0), optax.sgd(0.1))
        >>> @jax.jit
        ... def step(w, state):
        ...     g, h = jax.grad(main_loss)(w), jax.grad(auxiliary_loss)(w)
        ...     updates, state = tx.update(g, state, w, auxiliary_updates=h)
        ...     return optax.apply_updates(w, updates), state
        >>> w = jnp.zeros(2)
        >>> state = tx.init(w)
        >>> for t in range(4):
        ...     w, state = step(w, state)
        ...     coefficient = optax.tree_utils.tree_get(state, "coefficient")
        ...     print(t, round(float(coefficient[0]), 2))
        0 1.0
        1 0.41
        2 0.0
        3 0.0
        >>> for t in range(100):
        ...     w, state = step(w, state)
        >>> [round(float(x), 2) for x in w]
        [1.0, 2.0]

    Source:
        Joint Training of Multi-Token Prediction in Reinforcement Learning via Optimal Coefficient
        Calibration, `arXiv 2605.28184 <https://arxiv.org/abs/2605.28184>`_ (K = 1).
    """
    _check(scale, decay, bounds, eps, num_auxiliary)
    optimum = functools.partial(optimal_coefficient, scale=scale, eps=eps, bounds=bounds)

    def fresh(k: int) -> CalibrationState:
        # A buffer for each field: the same one twice could not be donated.
        floats = (jnp.zeros(shape, jnp.float32) for shape in ((k,), (k,), (k, k)))
        return CalibrationState(jnp.zeros((), jnp.int32), *floats)

    def init_fn(params: Any) -> CalibrationState:
        del params  # the state depends on neither their values nor their shapes
        return fresh(1 if num_auxiliary is None else num_auxiliary)

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        auxiliary_updates: Any = None,
        statistics: Statistics | None = None,
        **extra_args: Any,
    ) -> tuple[Any, CalibrationState]:
        del params, extra_args
        if auxiliary_updates is None and statistics is None:
            return updates, state
        trees = [] if auxiliary_updates is None else _align(auxiliary_updates, updates)
        statistics = _measure(updates, trees) if statistics is None else _validate(statistics)
        k = statistics.correlation.shape[0]
        if trees and len(trees) != k:
            raise ValueError(f"statistics are of {k} auxiliary gradients, got {len(trees)} of them")
        if _is_new_width(state.coefficient, k, num_auxiliary):
            state = fresh(k)
        state, finite = _advance(state, statistics, decay, optimum)
        if trees:
            updates = _combine(updates, trees, jnp.where(finite, state.coefficient, 0.0))
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fixed_auxiliary(
    coefficient: Any, *, num_auxiliary: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds auxiliary gradients with given weights: :math:`g + \sum_k \lambda_k h_k`.

    This is the baseline for `calibrate_auxiliary`, with the same update signature; it ignores
    ``statistics``. Every update counts, also one without ``auxiliary_updates``, which passes
    ``updates`` through. The state holds λ of the *next* update, for steps that multiply their
    auxiliary loss by it.

    Args:
        coefficient: One finite number for all h_k, a sequence of K, or an optax schedule that
            returns either for the number of updates so far.
        num_auxiliary: K, a static int; needed inside ``lax.scan`` if one number serves K > 1.

    Returns:
        A :class:`optax.GradientTransformationExtraArgs` with a :class:`FixedAuxiliaryState`.

    Raises:
        ValueError: Weights are not finite or not K; on update, auxiliary gradients have a
            structure, shapes or a number that does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from occ_jax.calibration import fixed_auxiliary
        >>> tx = fixed_auxiliary(0.5)
        >>> g, h = jnp.array([1.0, 2.0]), jnp.array([4.0, -2.0])
        >>> updates, state = tx.update(g, tx.init(g), auxiliary_updates=h)
        >>> updates.tolist()
        [3.0, 1.0]
    """
    _check(num_auxiliary=num_auxiliary)
    is_sequence = isinstance(coefficient, (list, tuple))
    values = cast(Sequence[Any], coefficient if is_sequence else [coefficient])
    width = len(values) if is_sequence else num_auxiliary
    if not values or num_auxiliary not in (None, width):
        raise ValueError(f"coefficient must be num_auxiliary={num_auxiliary} long, got {values}")
    if not all(math.isfinite(x) for x in values if isinstance(x, numbers.Real)):
        raise ValueError(f"coefficient must be finite, got {coefficient}")

    def weights(count: Any, k: int | None) -> jax.Array:
        now = coefficient(count) if callable(coefficient) else coefficient
        now = jnp.atleast_1d(jnp.asarray(now, jnp.float32))
        return now if k is None else jnp.broadcast_to(now, (k,))

    def init_fn(params: Any) -> FixedAuxiliaryState:
        del params
        count = jnp.zeros((), jnp.int32)
        return FixedAuxiliaryState(count, weights(count, width))

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        auxiliary_updates: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, FixedAuxiliaryState]:
        del params, extra_args
        now = state.coefficient
        if auxiliary_updates is not None:
            trees = _align(auxiliary_updates, updates)
            if _is_new_width(now, len(trees), width):
                now = jnp.broadcast_to(now, (len(trees),))
            updates = _combine(updates, trees, now)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, FixedAuxiliaryState(count, weights(count, now.shape[0]))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def optimal_coefficient(
    statistics: Statistics, scale: Any = 1.0, eps: Any = 1e-8, bounds: _Bounds = None
) -> jax.Array:
    r"""Computes the λ that maximises the improvement bound, inside `bounds` where given.

    .. math:: \lambda^* = \arg\max_{lo \le \lambda \le hi}
      \mathrm{scale}\; c^\top \lambda - \tfrac12 \lambda^\top (G + \epsilon I) \lambda

    Linearly dependent h_k have more than one maximiser. Without bounds the result is the one with
    the least :math:`\sum_k \lambda_k^2 (\|h_k\|^2 + \epsilon)`.

    Args:
        statistics: c [K] and G [K, K], float32; G symmetric, positive semi-definite.
        scale: Positive factor on c.
        eps: Positive regulariser of G.
        bounds: Smallest and largest λ; either may be infinite.

    Returns:
        λ [K], float32.

    Raises:
        ValueError: An argument is out of range, or the statistics have other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from occ_jax.calibration import Statistics, optimal_coefficient
        >>> statistics = Statistics(jnp.array([3.0, 2.5]), jnp.array([[2.0, 1.0], [1.0, 1.0]]))
        >>> [round(float(x), 2) for x in optimal_coefficient(statistics)]
        [0.5, 2.0]
        >>> [round(float(x), 2) for x in optimal_coefficient(statistics, bounds=(0.0, 1.5))]
        [0.75, 1.5]
    """
    _check(scale=scale, eps=eps, bounds=bounds)
    correlation, penalty = _validate(statistics)
    correlation, eps = jnp.float32(scale) * correlation, jnp.float32(eps)
    lo, hi = (jnp.float32(x) for x in ((-math.inf, math.inf) if bounds is None else bounds))
    k = correlation.shape[0]
    if k == 1:
        return jnp.clip(correlation / (penalty[0] + eps), lo, hi)
    # In units of the length of each h_k the matrix has a unit diagonal. Then float32 does not take
    # gradients that differ in size by orders of magnitude for linearly dependent ones, and scaling
    # one auxiliary loss scales its own λ and nothing else.
    length = jnp.sqrt(jnp.diagonal(penalty) + eps)
    matrix = (penalty + eps * jnp.eye(k, dtype=jnp.float32)) / (length[:, None] * length[None, :])
    if bounds is None:
        return _solve(matrix, correlation / length) / length
    return _maximise_in_box(matrix, correlation / length, lo, hi, length)


def inner_product_statistics(updates: Any, auxiliary_updates: Any) -> Statistics:
    r"""Measures :math:`c_k = \langle g, h_k\rangle` and :math:`G_{kl} = \langle h_k, h_l\rangle`.

    Args:
        updates: Main gradient g, a pytree of arrays of any float dtype.
        auxiliary_updates: One pytree like `updates`, or a list or tuple of K; None counts as zeros.

    Returns:
        c [K] and G [K, K], float32, replicated for every sharding of the gradients.

    Raises:
        ValueError: A tree does not fit `updates`.
    """
    return _measure(updates, _align(auxiliary_updates, updates))


def _advance(
    state: CalibrationState,
    statistics: Statistics,
    decay: Any,
    optimum: Callable[[Statistics], jax.Array],
) -> tuple[CalibrationState, jax.Array]:
    """Returns the state after one measurement, and whether it was finite and so counted."""
    measured = _is_finite(statistics.correlation) & _is_finite(statistics.penalty)
    # The debiased EMA is d_t = d_{t-1} + w_t (x - d_{t-1}) with w_t = (1 - β)/(1 - β^t). Written as
    # a mixture it is exactly x where w is 1: for the first measurement, and always for β = 0.
    decay = jnp.float32(decay)
    steps = state.count.astype(jnp.float32) + 1.0
    weight = (1.0 - decay) / -jnp.expm1(steps * jnp.log(decay))
    weight = jnp.where(state.count == 0, 1.0, weight)

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        # A measurement that is not finite is dropped below; zeros keep it out of the solver.
        return (1.0 - weight) * old + weight * jnp.where(measured, new, 0.0)

    # λ is the ratio of the EMAs, not the EMA of the ratio, so a measurement counts by its size. One
    # with c = G = 0, such as that of `log_prob_statistics` in the first mini-batch after a rollout,
    # shrinks both EMAs alike and leaves λ unchanged. An average of ratios would count its 0/ε as
    # λ = 0, and would give the noisy ratio of a small measurement the same weight as all others.
    correlation = average(state.correlation, statistics.correlation)
    penalty = average(state.penalty, statistics.penalty)
    coefficient = optimum(Statistics(correlation, penalty))
    finite = measured & _is_finite(coefficient)
    count = jnp.asarray(optax.safe_increment(state.count))
    advanced = CalibrationState(count, coefficient, correlation, penalty)
    return jax.tree.map(functools.partial(jnp.where, finite), advanced, state), finite


def _solve(matrix: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the minimum-norm solution for a positive semi-definite matrix [K, K]."""
    # Not a Cholesky solve: linearly dependent h_k make G singular, and in float32 an ε of 1e-8
    # does not change it. Σ_k λ_k h_k is zero along the dropped directions, so nothing is lost.
    values, vectors = jnp.linalg.eigh(matrix)
    keep = values > _RANK_TOLERANCE * values[-1]
    inverse = jnp.where(keep, 1.0 / jnp.where(keep, values, 1.0), 0.0)
    return _product(vectors, inverse * _product(vectors.T, target))


def _maximise_in_box(
    matrix: jax.Array, target: jax.Array, lo: jax.Array, hi: jax.Array, length: jax.Array
) -> jax.Array:
    """Maximises targetᵀμ - ½ μᵀ matrix μ over lo ≤ λ ≤ hi, where μ = length * λ; returns λ."""
    # The maximiser of a concave quadratic over a box is stationary in its free components and has
    # the others at a bound, so trying every choice of free, low and high is exact. That makes 3^K
    # systems of size K: cheap for a few modules, and without the branches and the tolerance of an
    # iterative solver. Linearly dependent free components do no harm: along the dependence the
    # bound is constant, and it leads to a maximiser with one more component at its bound.
    k = target.shape[0]
    choices = jnp.indices((3,) * k).reshape(k, -1).T  # [3^K, K]: 0 free, 1 low, 2 high

    def candidate(choice: jax.Array) -> tuple[jax.Array, jax.Array]:
        free = choice == 0
        held = jnp.where(free, 0.0, jnp.where(choice == 1, lo, hi))
        exists = _is_finite(held)  # nothing is held at an infinite bound
        held = jnp.where(exists, held, 0.0)
        system = jnp.where(free[:, None] & free[None, :], matrix, jnp.eye(k, dtype=jnp.float32))
        remainder = jnp.where(free, target - _product(matrix, length * held), 0.0)
        weights = jnp.where(free, _solve(system, remainder) / length, held)
        weights = jnp.clip(weights, lo, hi)
        scaled = length * weights
        gain = jnp.sum(scaled * (target - 0.5 * _product(matrix, scaled)))
        return weights, jnp.where(exists, gain, -jnp.inf)

    weights, gains = jax.vmap(candidate)(choices)
    return weights[jnp.argmax(gains)]


def _product(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    # A dot rounds to bfloat16 on a TPU by default; K is too small for speed to matter.
    return jnp.sum(matrix * vector[None, :], axis=-1)


def _measure(updates: Any, trees: list[_Leaves]) -> Statistics:
    main = jax.tree.leaves(updates, is_leaf=_is_none)
    correlation = jnp.stack([_inner_product(main, h) for h in trees])
    # Under jit XLA computes each pair of mirror images once.
    penalty = [jnp.stack([_inner_product(a, b) for b in trees]) for a in trees]
    return Statistics(correlation, jnp.stack(penalty))


def _inner_product(left: _Leaves, right: _Leaves) -> jax.Array:
    # Sums of products, not vdots: a contraction over a sharded axis is an error on Explicit meshes.
    total = jnp.zeros((), jnp.float32)
    for x, y in zip(left, right, strict=True):
        if x is not None and y is not None:
            total += jnp.sum(jnp.asarray(x, jnp.float32) * jnp.asarray(y, jnp.float32))
    return total


def _combine(updates: Any, trees: list[_Leaves], coefficient: jax.Array) -> Any:
    """Returns updates + Σ_k coefficient_k h_k, leaf by leaf in the dtype of `updates`."""
    main, structure = jax.tree.flatten(updates, is_leaf=_is_none)

    def combine(g: Any, *shared: Any) -> Any:
        if all(h is None for h in shared):
            return g
        total = g
        for weight, h in zip(coefficient, shared, strict=True):
            if h is not None:
                # The weight is float32, so narrower leaves are added up in float32 and rounded once
                # at the end. The `where` keeps a NaN in h out if its weight is zero.
                total = jnp.where(weight != 0.0, total + weight * h, total)
        return total.astype(jnp.result_type(g))

    return jax.tree.unflatten(structure, map(combine, main, *trees))


def _align(auxiliary_updates: Any, updates: Any) -> list[_Leaves]:
    """Returns, for each of the K auxiliary trees, its leaves in the order of those of `updates`."""
    # A tree with the structure of `updates` is one tree, also if both are a list or a tuple.
    single = _leaves_like(auxiliary_updates, updates)
    if single is not None:
        return [single]
    is_sequence = isinstance(auxiliary_updates, (list, tuple))
    sequence = cast(Sequence[Any], auxiliary_updates if is_sequence else [auxiliary_updates])
    trees = [leaves for tree in sequence if (leaves := _leaves_like(tree, updates)) is not None]
    if not trees or len(trees) < len(sequence):
        raise ValueError(
            "auxiliary_updates must be one pytree with the structure of updates or a list or tuple "
            f"of at least one; {len(sequence) - len(trees)} of {len(sequence)} differ"
        )
    return trees


def _leaves_like(auxiliary: Any, updates: Any) -> _Leaves | None:
    """Returns the leaves of one tree, None under its Nones; None if it is no such tree."""
    leaves, structure = jax.tree.flatten(auxiliary, is_leaf=_is_none)
    try:
        subtrees = structure.flatten_up_to(updates)
    except ValueError:
        return None
    spread: _Leaves = []
    for h, g in zip(leaves, subtrees, strict=True):
        if h is not None and not jax.tree_util.all_leaves([g]):
            return None
        if h is not None and jnp.shape(h) != jnp.shape(g):
            raise ValueError(
                f"auxiliary_updates has a leaf of shape {jnp.shape(h)} where updates has "
                f"{jnp.shape(g)}"
            )
        spread += [h] * len(jax.tree.leaves(g, is_leaf=_is_none))
    return spread


def _is_new_width(coefficient: jax.Array, k: int, num_auxiliary: int | None) -> bool:
    known = coefficient.shape[0]
    if known != k and (known != 1 or num_auxiliary is not None):
        raise ValueError(f"num_auxiliary is {known}, got {k} auxiliary gradients")
    return known != k


def _validate(statistics: Statistics) -> Statistics:
    correlation, penalty = (jnp.asarray(x, jnp.float32) for x in statistics)
    k = correlation.size
    if k == 0 or correlation.shape != (k,) or penalty.shape != (k, k):
        raise ValueError(
            "statistics must be a correlation of shape [K] and a penalty of shape [K, K], got "
            f"shapes {correlation.shape} and {penalty.shape}"
        )
    return Statistics(correlation, penalty)


def _check(
    scale: Any = 1.0,
    decay: Any = 0.0,
    bounds: Any = None,
    eps: Any = 1.0,
    num_auxiliary: Any = None,
) -> None:
    # Plain numbers only: under `optax.inject_hyperparams` the arguments may be traced.
    for name, value in (("scale", scale), ("eps", eps)):
        if isinstance(value, numbers.Real) and not 0.0 < float(value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if isinstance(decay, numbers.Real) and not 0.0 <= float(decay) < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if bounds is not None:
        pair = cast(Sequence[Any], bounds if isinstance(bounds, (list, tuple)) else ())
        plain = all(isinstance(x, numbers.Real) for x in pair)
        if len(pair) != 2 or (plain and not float(pair[0]) < float(pair[1])):
            raise ValueError(f"bounds must be None or (lo, hi) with lo < hi, got {bounds}")
    is_count = isinstance(num_auxiliary, numbers.Integral) and int(num_auxiliary) >= 1
    if num_auxiliary is not None and not is_count:
        raise ValueError(f"num_auxiliary must be None or a static int ≥ 1, got {num_auxiliary}")


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _is_none(x: Any) -> bool:
    return x is None
