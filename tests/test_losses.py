import doctest
import functools
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from occ_jax.rl import (
    AGGREGATIONS,
    aggregate,
    aggregation_denominator,
    cispo_loss,
    clipped_policy_loss,
    gspo_loss,
    kl_penalty,
    losses,
    mean,
    negative_log_likelihood,
    rollout_correction,
)

POLICY_LOSSES = {
    "clipped": clipped_policy_loss,
    "clipped-dual": functools.partial(clipped_policy_loss, dual_clip=1.5),
    "gspo": functools.partial(gspo_loss, clip_low=0.1, clip_high=0.15),
    "cispo": cispo_loss,
}
each_policy_loss = pytest.mark.parametrize(
    "policy_loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES.keys()
)
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def array(values):
    """A float32 array by way of NumPy, as JAX compiles each operation for each shape."""
    return jnp.asarray(np.asarray(values, np.float32))


def one_token(loss, ratio, advantage, **settings):
    """Value and gradient in the log-probability of a loss on a single token of a given ratio."""

    def value(log_prob):
        return mean(loss(log_prob, array([[-1]]), array([advantage]), array([[1]]), **settings))

    result, gradient = jax.value_and_grad(value)(array([[-1 + math.log(ratio)]]))
    return result, gradient[0, 0]


@functools.cache
def random_batch(rows=6, tokens=5, spread=0.3):
    """Log-probabilities, old ones, advantages a row, and a mask with an empty row (the third)."""
    random = np.random.default_rng(7)
    old_log_probs = -random.uniform(0.1, 3.0, (rows, tokens))
    log_probs = old_log_probs + spread * random.normal(size=(rows, tokens))
    advantages = random.normal(size=rows)
    mask = random.random((rows, tokens)) < 0.7
    mask[:, 1] = True
    mask[2] = False
    return array(log_probs), array(old_log_probs), array(advantages), jnp.asarray(mask)


# Two rows of ratios (1.5, 1.1, masked) and (0.5, masked, masked), advantages 1 and -2.
HAND_OLD = array(np.log(np.full((2, 3), 0.5)))
HAND_LOG_PROBS = array(np.log(0.5 * np.array([[1.5, 1.1, 9.0], [0.5, 9.0, 9.0]])))
HAND_ADVANTAGES = array([1.0, -2.0])
HAND_MASK = array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


# --- aggregation


@pytest.mark.parametrize(
    ("aggregation", "normalizer", "total", "denominator"),
    [
        # Rows (1, 2 | 4 masked), (8 | masked), all masked. Tokens: 1 + 2 + 8 over 3.
        ("token-mean", None, 11.0, 3.0),
        # Row means 1.5 and 8, over the 2 rows that have tokens.
        ("seq-mean-token-mean", None, 9.5, 2.0),
        ("seq-mean-token-sum", None, 11.0, 2.0),
        # Divided by T = 3, or by the constant.
        ("seq-mean-token-sum-norm", None, 11.0 / 3.0, 2.0),
        ("seq-mean-token-sum-norm", 10.0, 1.1, 2.0),
        # Only the last aggregation reads the constant.
        ("seq-mean-token-sum", 10.0, 11.0, 2.0),
    ],
)
def test_aggregate_matches_hand_derivation(aggregation, normalizer, total, denominator):
    values = array([[1.0, 2.0, 4.0], [8.0, np.nan, np.inf], [np.nan] * 3])
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    for dtype in (bool, jnp.float32, jnp.bfloat16):
        typed_mask = jnp.asarray(mask.astype(dtype))
        result = aggregate(values, typed_mask, aggregation, normalizer)
        np.testing.assert_allclose(result, (total, denominator), rtol=1e-6)
        assert aggregation_denominator(typed_mask, aggregation) == denominator


@each_aggregation
def test_aggregate_of_nothing_is_zero(aggregation):
    def value(values):
        return aggregate(values, array(np.zeros((2, 3))), aggregation)

    result, gradient = jax.value_and_grad(value, has_aux=True)(array(np.full((2, 3), np.nan)))
    assert result == (0, 0)
    np.testing.assert_array_equal(gradient, 0.0)


def test_counts_do_not_saturate():
    # 2^24 + 4 is a float32, but 2^24 + 1 is not: adding ones in float32 would stop there.
    mask = jax.ShapeDtypeStruct((4097, 4096), jnp.bool_)
    jaxpr = jax.make_jaxpr(lambda mask: aggregation_denominator(mask, "token-mean"))(mask)
    (summed,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "reduce_sum")
    assert summed.outvars[0].aval.dtype == jnp.int32


# --- the clipped loss


@pytest.mark.parametrize(
    ("aggregation", "normalizer", "total", "denominator"),
    [
        # L = (-1.28, -1.1) and 2 * 0.8 = 1.6.
        ("token-mean", None, -0.78, 3.0),
        ("seq-mean-token-mean", None, -1.19 + 1.6, 2.0),
        ("seq-mean-token-sum", None, -2.38 + 1.6, 2.0),
        ("seq-mean-token-sum-norm", None, -0.78 / 3, 2.0),
        ("seq-mean-token-sum-norm", 10.0, -0.078, 2.0),
    ],
)
def test_clipped_loss_matches_hand_derivation(aggregation, normalizer, total, denominator):
    loss = clipped_policy_loss(
        HAND_LOG_PROBS,
        HAND_OLD,
        HAND_ADVANTAGES,
        HAND_MASK,
        aggregation=aggregation,
        normalizer=normalizer,
    )
    np.testing.assert_allclose(loss.sum, total, rtol=1e-5)
    assert loss.denominator == denominator
    np.testing.assert_allclose(mean(loss), total / denominator, rtol=1e-5)
    # -ln(1.5 * 1.1 * 0.5) = 0.1923719; ratios add to 3.1; one token is held at either end.
    expected = {
        "tokens": 3.0,
        "approx_kl": 0.1923719,
        "ratio": 3.1,
        "clip_fraction_low": 1.0,
        "clip_fraction_high": 1.0,
        "clip_fraction_dual": 0.0,
    }
    assert loss.metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(loss.metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("ratio", "advantage", "settings", "value", "gradient"),
    [
        # The gradient of -A r in l is -A r. Gains end outside the range, losses do not.
        (1.5, 1.0, {}, -1.28, 0.0),
        (0.5, 1.0, {}, -0.5, -0.5),
        (1.5, -1.0, {}, 1.5, 1.5),
        (0.5, -1.0, {}, 0.8, 0.0),
        # Clip-higher: 1.25 is inside, 0.75, as far from 1, is not.
        (1.25, 1.0, {}, -1.25, -1.25),
        (0.75, -1.0, {}, 0.8, 0.0),
        # The other way round.
        (1.25, 1.0, {"clip_low": 0.28, "clip_high": 0.2}, -1.2, 0.0),
        (0.75, -1.0, {"clip_low": 0.28, "clip_high": 0.2}, 0.75, 0.75),
        # A clip of 0 is a clip; one of 1 or more below, or infinity above, is none.
        (1.1, 1.0, {"clip_high": 0.0}, -1.0, 0.0),
        (0.9, -1.0, {"clip_low": 0.0}, 1.0, 0.0),
        (0.01, -1.0, {"clip_low": 1.0}, 0.01, 0.01),
        (50.0, 1.0, {"clip_high": math.inf}, -50.0, -50.0),
        # Dual clip: bounds what a negative advantage can cost, and only that.
        (5.0, -1.0, {}, 5.0, 5.0),
        (5.0, -1.0, {"dual_clip": 3.0}, 3.0, 0.0),
        (2.0, -1.0, {"dual_clip": 3.0}, 2.0, 2.0),
        (5.0, 1.0, {"dual_clip": 3.0}, -1.28, 0.0),
        (5.0, 1.0, {"dual_clip": 3.0, "clip_high": 9.0}, -5.0, -5.0),
        # No advantage, no loss.
        (5.0, 0.0, {}, 0.0, 0.0),
        # The log-ratio's own bound: e^20, no e^30.
        (math.exp(30.0), -1.0, {}, 4.851652e8, 0.0),
    ],
)
def test_each_side_of_the_clip(ratio, advantage, settings, value, gradient):
    result = one_token(clipped_policy_loss, ratio, advantage, **settings)
    np.testing.assert_allclose(result, (value, gradient), rtol=1e-5)


def test_clip_metrics_tell_the_ends_apart():
    # Ratios 5, 5, 0.5, 0.5 with advantages of either sign: clip(r) silences the second (A > 0
    # above) and the third (A < 0 below); the dual clip silences the first. r in range: nothing.
    log_probs = array(np.log([[5.0, 5.0, 0.5], [0.5, 1.0, 1.0]]))
    advantages = array([[-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    zeros, ones = array(np.zeros((2, 3))), array(np.ones((2, 3)))
    metrics = clipped_policy_loss(log_probs, zeros, advantages, ones, dual_clip=3.0).metrics
    fractions = [metrics[f"clip_fraction_{end}"] for end in ("low", "high", "dual")]
    assert fractions == [1.0, 1.0, 1.0]
    # CISPO's weight is clipped whatever the sign.
    metrics = cispo_loss(log_probs, zeros, advantages, ones).metrics
    assert [metrics[f"clip_fraction_{end}"] for end in ("low", "high")] == [2.0, 2.0]


@each_aggregation
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_on_policy_the_clipped_gradient_is_reinforce(aggregation, clip):
    log_probs, _, advantages, mask = random_batch()

    def clipped(log_probs):
        # The same array as old log-probabilities: they are data, so no gradient cancels.
        return mean(
            clipped_policy_loss(
                log_probs,
                log_probs,
                advantages,
                mask,
                clip_low=clip,
                clip_high=clip,
                dual_clip=3.0,
                aggregation=aggregation,
            )
        )

    def reinforce(log_probs):
        total, denominator = aggregate(-advantages[:, None] * log_probs, mask, aggregation)
        return total / denominator

    gradient, expected = (jax.jit(jax.grad(f))(log_probs) for f in (clipped, reinforce))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    if aggregation == "token-mean":
        expected = np.where(mask, -np.asarray(advantages)[:, None], 0) / np.sum(mask)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


# --- GSPO


def test_gspo_matches_hand_derivation():
    # Row 1: mean(0.2, -0.1) = 0.05, rho = e^0.05 = 1.0512711, inside (0.9, 1.2), A = 1.
    # Row 2: rho = e^-0.3 = 0.7408182, A = -1: held at 0.9.
    # Value (-1.0512711 + 0.9) / 2 rows. Gradient -A rho / (2 tokens * 2 rows) = -0.2628178 on
    # each token of row 1, although their own ratios differ; none on the clipped row.
    log_ratio = np.array([[0.2, -0.1, 9.0], [-0.3, 9.0, 9.0]])
    old_log_probs = array(np.full((2, 3), -1.5))
    log_probs = array(log_ratio - 1.5)

    def loss(log_probs):
        return gspo_loss(
            log_probs, old_log_probs, array([1.0, -1.0]), HAND_MASK, clip_low=0.1, clip_high=0.2
        )

    result = loss(log_probs)
    np.testing.assert_allclose(result.sum, -0.1512711, rtol=1e-5)
    assert result.denominator == 2.0
    gradient = jax.grad(lambda log_probs: mean(loss(log_probs)))(log_probs)
    expected = [[-0.2628178, -0.2628178, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    # -(0.2 - 0.1 - 0.3); 2 * 1.0512711 + 0.7408182.
    expected_metrics = {
        "tokens": 3.0,
        "approx_kl": 0.2,
        "ratio": 2.8433604,
        "clip_fraction_low": 1.0,
        "clip_fraction_high": 0.0,
    }
    assert result.metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(result.metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        # The defaults: 1 - 3e-4 and 1 + 4e-4.
        (1.0005, 1.0, -1.0004, 0.0),
        (1.00035, 1.0, -1.00035, -1.00035),
        (0.9996, -1.0, 0.9997, 0.0),
        (0.99975, -1.0, 0.99975, 0.99975),
        # The log-ratio is held at 10 from above, and not from below.
        (math.exp(15.0), -1.0, math.exp(10.0), 0.0),
        (math.exp(-15.0), 1.0, -math.exp(-15.0), -math.exp(-15.0)),
    ],
)
def test_each_side_of_the_gspo_clip(ratio, advantage, value, gradient):
    result = one_token(gspo_loss, ratio, advantage)
    np.testing.assert_allclose(result, (value, gradient), rtol=2e-6)


def test_gspo_on_rows_of_one_token_is_the_clipped_loss():
    log_probs, old_log_probs, advantages, _ = random_batch()
    mask = array(np.eye(5)[[0, 4, 2, 1, 3, 2]])
    arguments = (old_log_probs, advantages, mask)
    for clip in (0.1, 50.0):
        results = []
        for loss in (gspo_loss, clipped_policy_loss):
            clipped = functools.partial(loss, clip_low=clip, clip_high=clip)
            value = lambda p, f=clipped: mean(f(p, *arguments))  # noqa: E731
            results.append(jax.value_and_grad(value)(log_probs))
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
        np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-5)


# --- CISPO


def test_cispo_matches_hand_derivation():
    # Weights 1.28 (of 1.5), 1.1 and 0.8 (of 0.5); l = ln 0.75, ln 0.55, ln 0.25.
    # Row 1, A = 1: -1.28 * -0.2876821 = 0.3682331 and -1.1 * -0.5978370 = 0.6576207;
    # row 2, A = -2: 2 * 0.8 * -1.3862944 = -2.2180710. Sum -1.1922172 over 3 tokens.
    loss = cispo_loss(HAND_LOG_PROBS, HAND_OLD, HAND_ADVANTAGES, HAND_MASK)
    np.testing.assert_allclose(loss.sum, -1.1922172, rtol=1e-5)
    assert loss.denominator == 3.0
    loss = cispo_loss(
        HAND_LOG_PROBS, HAND_OLD, HAND_ADVANTAGES, HAND_MASK, aggregation="seq-mean-token-mean"
    )
    np.testing.assert_allclose(loss.sum, (0.3682331 + 0.6576207) / 2 - 2.2180710, rtol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.5, 1.0, -1.28), (1.5, -1.0, 1.28), (0.5, -1.0, 0.8), (0.5, 1.0, -0.8), (1.1, 1.0, -1.1)],
)
def test_cispo_keeps_the_gradient_of_clipped_tokens(ratio, advantage, gradient):
    np.testing.assert_allclose(one_token(cispo_loss, ratio, advantage)[1], gradient, rtol=1e-5)
    if (ratio - 1) * advantage > 0.28 * abs(advantage):
        assert one_token(clipped_policy_loss, ratio, advantage)[1] == 0.0


def test_cispo_without_a_low_clip():
    # clip_low=1: no limit below, the weight is the ratio.
    np.testing.assert_allclose(one_token(cispo_loss, 0.01, 1.0, clip_low=1.0)[1], -0.01, rtol=1e-5)


# --- what all policy losses share


@each_policy_loss
def test_advantages_of_rows_and_of_tokens_agree(policy_loss):
    log_probs, old_log_probs, advantages, mask = random_batch()
    spread = array(np.tile(advantages[:, None], 5))
    rows = policy_loss(log_probs, old_log_probs, advantages, mask)
    tokens = policy_loss(log_probs, old_log_probs, spread, mask)
    assert rows.sum == tokens.sum


ROW_BY_ROW = [slice(row, row + 1) for row in range(6)]


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        *((name, way) for name in ("clipped", "clipped-dual", "cispo") for way in AGGREGATIONS),
        ("gspo", "seq-mean-token-mean"),
    ],
)
def test_micro_batches_add_up_to_the_batch(name, aggregation):
    batch = random_batch()
    policy_loss = POLICY_LOSSES[name]
    if name != "gspo":
        policy_loss = functools.partial(policy_loss, aggregation=aggregation, normalizer=8.0)
    denominator = aggregation_denominator(batch[3], aggregation)

    def value(log_probs, rows, divisor):
        _, old_log_probs, advantages, mask = (field[rows] for field in batch)
        loss = policy_loss(log_probs[rows], old_log_probs, advantages, mask)
        return loss.sum / divisor, loss

    gradient, whole = jax.grad(value, has_aux=True)(batch[0], slice(None), denominator)
    # A row a part, so that one part is empty.
    parts = [jax.grad(value, has_aux=True)(batch[0], rows, denominator) for rows in ROW_BY_ROW]
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        summed,
        (gradient, whole),
    )
    assert whole.denominator == denominator


def test_an_empty_row_is_as_good_as_absent():
    batch = random_batch()
    kept = np.array([0, 1, 3, 4, 5])
    whole = every_policy_loss(*batch)
    without = every_policy_loss(*(jnp.asarray(np.asarray(field)[kept]) for field in batch))
    for name, (value, gradient) in whole.items():
        np.testing.assert_array_equal(gradient[2], 0.0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            (value, np.asarray(gradient)[kept]),
            without[name],
        )


@each_policy_loss
def test_an_empty_batch_gives_zero(policy_loss):
    log_probs, old_log_probs, advantages, _ = random_batch()

    def value(log_probs):
        return mean(policy_loss(log_probs, old_log_probs, advantages, array(np.zeros((6, 5)))))

    result, gradient = jax.value_and_grad(value)(log_probs)
    assert result == 0
    np.testing.assert_array_equal(gradient, 0.0)


@each_policy_loss
@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -jnp.inf])
def test_masked_positions_reach_neither_value_nor_gradient(policy_loss, garbage):
    log_probs, old_log_probs, advantages, mask = random_batch()
    spread = np.tile(advantages[:, None], 5)
    arrays = (log_probs, old_log_probs, array(spread), array(np.full((6, 5), 0.5)))

    def value_and_gradient(arrays):
        def value(log_probs):
            loss = policy_loss(log_probs, *arrays[1:3], mask, weights=arrays[3])
            return mean(loss), loss.metrics

        return jax.value_and_grad(value, has_aux=True)(arrays[0])

    clean = value_and_gradient(arrays)
    dirty = value_and_gradient([array(np.where(mask, field, garbage)) for field in arrays])
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.all(np.isfinite(dirty[1]))
    np.testing.assert_array_equal(dirty[1][~mask], 0.0)
    assert np.all(dirty[1][mask] != 0) or policy_loss is not POLICY_LOSSES["cispo"]


@each_policy_loss
def test_nan_in_the_advantage_of_an_empty_row(policy_loss):
    log_probs, old_log_probs, advantages, mask = random_batch()
    clean = policy_loss(log_probs, old_log_probs, advantages, mask)
    dirty = policy_loss(log_probs, old_log_probs, advantages.at[2].set(jnp.nan), mask)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@each_policy_loss
def test_nan_at_trained_positions_is_not_hidden(policy_loss):
    log_probs, *rest = random_batch()
    assert np.isnan(policy_loss(log_probs.at[0, 1].set(jnp.nan), *rest).sum)


@each_policy_loss
def test_only_the_log_probs_get_a_gradient(policy_loss):
    log_probs, old_log_probs, advantages, mask = random_batch()

    def value(old_log_probs, advantages, weights):
        return mean(policy_loss(log_probs, old_log_probs, advantages, mask, weights=weights))

    gradients = jax.grad(value, argnums=(0, 1, 2))(
        old_log_probs, advantages, array(np.ones((6, 5)))
    )
    jax.tree.map(lambda gradient: np.testing.assert_array_equal(gradient, 0.0), gradients)


@each_policy_loss
def test_half_precision_is_lifted_before_arithmetic(policy_loss):
    log_probs, old_log_probs, advantages, mask = random_batch()
    halves = [field.astype(jnp.bfloat16) for field in (log_probs, old_log_probs, advantages, mask)]
    loss = policy_loss(*halves)
    assert {leaf.dtype for leaf in jax.tree.leaves(loss)} == {jnp.dtype(jnp.float32)}
    lifted = policy_loss(*(field.astype(jnp.float32) for field in halves))
    jax.tree.map(np.testing.assert_array_equal, loss, lifted)


@each_policy_loss
def test_jit_agrees_with_eager(policy_loss):
    batch = random_batch()
    eager, jitted = policy_loss(*batch), jax.jit(policy_loss)(*batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, jitted)


@jax.jit
def every_policy_loss(*batch):
    """Values, gradients and loss fields of all policy losses, in one compilation."""

    def value(log_probs, policy_loss):
        loss = policy_loss(log_probs, *batch[1:])
        return mean(loss), loss

    return {
        name: jax.value_and_grad(functools.partial(value, policy_loss=loss), has_aux=True)(batch[0])
        for name, loss in POLICY_LOSSES.items()
    }


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_eight_devices_agree_with_one(axis_type):
    batch = random_batch(rows=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        by_rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded = every_policy_loss(*jax.device_put(batch, by_rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        sharded,
        every_policy_loss(*batch),
    )


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(5)))
def test_order_of_rows_and_of_tokens_does_not_matter(rows, columns):
    batch = random_batch()
    rows, columns = np.array(rows), np.array(columns)
    order = np.ix_(rows, columns)
    log_probs, old_log_probs, advantages, mask = (np.asarray(field) for field in batch)
    shuffled = every_policy_loss(
        *map(jnp.asarray, (log_probs[order], old_log_probs[order], advantages[rows], mask[order]))
    )
    for name, (value, gradient) in every_policy_loss(*batch).items():
        expected = (value, np.asarray(gradient)[order])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            shuffled[name],
            expected,
        )


def test_rollout_correction_weighs_the_clipped_loss():
    # Ratios to the sampler 3 (capped at 2), 1/2 and 1; e^30 is bounded as well.
    old_log_probs = array(np.log([[0.6, 0.2, 0.5, 1.0]]))
    rollout = array(np.log([[0.2, 0.4, 0.5, math.exp(-30.0)]]))
    weights = rollout_correction(old_log_probs, rollout)
    np.testing.assert_allclose(weights, [[2.0, 0.5, 1.0, 2.0]], rtol=1e-5)
    np.testing.assert_allclose(
        rollout_correction(old_log_probs, rollout, cap=1e9), [[3.0, 0.5, 1.0, math.exp(20)]], 1e-5
    )
    # Policy ratios 1.5 and 1.1, A = 1: -1.28 * 2 - 1.1 * 0.5, then two tokens with ratio 1.
    log_probs = array(np.log([[0.9, 0.22, 0.5, 1.0]]))
    ones = array(np.ones((1, 4)))
    loss = jax.jit(clipped_policy_loss)(log_probs, old_log_probs, ones, ones, weights=weights)
    np.testing.assert_allclose(loss.sum, -2.56 - 0.55 - 1.0 - 2.0, rtol=1e-5)
    gradient = jax.grad(lambda old: rollout_correction(old, rollout).sum())(old_log_probs)
    np.testing.assert_array_equal(gradient, 0.0)


# --- likelihood


@pytest.mark.parametrize(
    ("aggregation", "total", "denominator"),
    [
        # -l = (1, 2), (4).
        ("token-mean", 7.0, 3.0),
        ("seq-mean-token-mean", 5.5, 2.0),
        ("seq-mean-token-sum", 7.0, 2.0),
        ("seq-mean-token-sum-norm", 7.0 / 3, 2.0),
    ],
)
def test_negative_log_likelihood_matches_hand_derivation(aggregation, total, denominator):
    log_probs = array([[-1.0, -2.0, -np.inf], [-4.0, np.nan, np.inf]])
    loss = negative_log_likelihood(log_probs, HAND_MASK, aggregation=aggregation)
    np.testing.assert_allclose(loss[:2], (total, denominator), rtol=1e-6)
    assert loss.metrics == {"tokens": 3.0}


def test_negative_log_likelihood_has_no_gradient_at_masked_positions():
    log_probs = array([[-1.0, -2.0, -np.inf], [-4.0, np.nan, np.inf]])
    gradient = jax.grad(lambda p: mean(negative_log_likelihood(p, HAND_MASK)))(log_probs)
    np.testing.assert_allclose(gradient, [[-1 / 3, -1 / 3, 0], [-1 / 3, 0, 0]], rtol=1e-6)


@each_aggregation
def test_likelihoods_add_up_over_micro_batches(aggregation):
    log_probs, _, _, mask = random_batch()
    function = functools.partial(negative_log_likelihood, aggregation=aggregation)
    whole = function(log_probs, mask)
    parts = [function(log_probs[rows], mask[rows]) for rows in ROW_BY_ROW]
    summed = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), summed, whole)


# --- KL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # p = 1/2: against 1/4, l - l_ref = ln 2; against 1, -ln 2.
        ("k1", [0.6931472, -0.6931472]),
        ("k2", [0.2402265, 0.2402265]),
        # 1/2 + ln 2 - 1;  2 - ln 2 - 1.
        ("k3", [0.1931472, 0.3068528]),
    ],
)
def test_kl_estimates_match_hand_derivation(kind, expected):
    log_probs, reference = array(np.log([[0.5, 0.5]])), array(np.log([[0.25, 1.0]]))
    np.testing.assert_allclose(kl_penalty(log_probs, reference, kind), [expected], rtol=1e-5)
    if kind == "k3":
        np.testing.assert_allclose(kl_penalty(log_probs, reference), [expected], rtol=1e-5)


def test_kl_bounds():
    # k3 of d = 3 is e^3 - 4 = 16.0855, held at 10; of d = 30 too, of d = -30 (bounded at -20)
    # e^-20 + 19. Neither k1 nor k2 is bounded.
    log_probs = array([[-3.0, -30.0, 0.0, 0.0]])
    reference = array([[0.0, 0.0, -30.0, -8.0]])
    # d = -8: e^-8 + 7 = 7.0003355.
    np.testing.assert_allclose(
        kl_penalty(log_probs, reference, "k3"), [[10.0, 10.0, 10.0, 7.0003355]], rtol=1e-6
    )
    np.testing.assert_array_equal(kl_penalty(log_probs, reference, "k1"), [[-3, -30, 30, 8]])
    np.testing.assert_array_equal(kl_penalty(log_probs, reference, "k2"), [[4.5, 450, 450, 32]])
    # Infinite differences stay finite in k3.
    np.testing.assert_array_equal(kl_penalty(log_probs, log_probs - np.inf), 10.0)


def test_k3_is_never_negative_and_is_precise_near_the_reference():
    small = np.logspace(-10, 0.9, 4001, dtype=np.float32)
    d = np.concatenate([small, -small, np.float32([0.0, 1e-2, -1e-2, 1e-3])])[None]
    k3 = np.asarray(kl_penalty(array(np.zeros_like(d)), array(d), "k3"))
    assert k3.min() == 0.0
    # What the formula as it stands would do in the same precision.
    assert (np.exp(d) - d - 1).min() < 0
    # d²/2 + d³/6 to leading orders.
    near = np.float64(d[0, -3:])
    np.testing.assert_allclose(k3[0, -3:], near**2 / 2 + near**3 / 6, rtol=1e-3)


def test_expectations_of_the_estimators_over_a_categorical():
    # Σ p ln(p/q) for p = (0.5, 0.3, 0.2), q = (0.2, 0.5, 0.3):
    # 0.5 * 0.9162907 - 0.3 * 0.5108256 - 0.2 * 0.4054651 = 0.2238047.
    p = np.array([0.5, 0.3, 0.2])
    log_p, log_q = array(np.log(p)), array(np.log([[0.2, 0.5, 0.3]]))
    for kind in ("k1", "k3"):
        expectation = (p * np.asarray(kl_penalty(log_p[None], log_q, kind))[0]).sum()
        np.testing.assert_allclose(expectation, 0.2238047, rtol=1e-5)

    def expected_gradient(kind):
        # Sampling is not differentiated: p is held, as it is for sampled tokens.
        def value(logits):
            return (array([p]) * kl_penalty(jax.nn.log_softmax(logits)[None], log_q, kind)).sum()

        return jax.jit(jax.grad(value))(log_p)

    def divergence(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jnp.exp(log_p) * (log_p - log_q[0])).sum()

    np.testing.assert_allclose(
        expected_gradient("k2"), jax.jit(jax.grad(divergence))(log_p), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(expected_gradient("k1"), 0.0, atol=1e-7)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_masked_garbage_in_the_kl(kind):
    log_probs, reference, _, mask = random_batch()

    def value(log_probs, reference):
        return kl_penalty(log_probs, reference, kind, mask=mask).sum()

    dirty = array(np.where(mask, log_probs, np.nan)), array(np.where(mask, reference, -np.inf))
    result, gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(*dirty)
    clean = np.where(mask, kl_penalty(log_probs, reference, kind), 0)
    np.testing.assert_allclose(result, clean.sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradients[0][~mask], 0.0)
    assert np.all(np.isfinite(gradients[0]))
    np.testing.assert_array_equal(gradients[1], 0.0)


# --- bad input, annotations, examples

ROWS = array(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: aggregate(ROWS, ROWS, "mean"),
            "aggregation='mean'; allowed: token-mean, seq-mean-token-mean, seq-mean-token-sum, seq",
        ),
        (lambda: aggregation_denominator(ROWS, "sum"), "aggregation='sum'; allowed"),
        (lambda: aggregation_denominator(ROWS[0], "token-mean"), r"mask has shape \(3,\)"),
        (
            lambda: aggregate(ROWS, ROWS, "seq-mean-token-sum-norm", 0.0),
            "normalizer=0.0; allowed: a number of tokens > 0",
        ),
        (lambda: aggregate(ROWS, ROWS[:1], "token-mean"), r"mask has shape \(1, 3\)"),
        (lambda: aggregate(ROWS[0], ROWS[0], "token-mean"), r"values has shape \(3,\)"),
        (
            lambda: clipped_policy_loss(ROWS, ROWS, ROWS[:, 0], ROWS, aggregation="tokens"),
            "aggregation='tokens'; allowed",
        ),
        (
            lambda: clipped_policy_loss(ROWS, ROWS, ROWS, ROWS, clip_low=-0.1),
            "clip_low=-0.1; allowed: a number >= 0",
        ),
        (lambda: gspo_loss(ROWS, ROWS, ROWS, ROWS, clip_high=-1.0), "clip_high=-1.0; allowed"),
        (lambda: cispo_loss(ROWS, ROWS, ROWS, ROWS, clip_high=math.nan), "clip_high=nan; allowed"),
        (
            lambda: clipped_policy_loss(ROWS, ROWS, ROWS, ROWS, dual_clip=1.0),
            "dual_clip=1.0; allowed: a number > 1",
        ),
        (
            lambda: clipped_policy_loss(ROWS, ROWS, jnp.zeros(3), ROWS),
            r"advantages has shape \(3,\); allowed: \(2,\), one a row, or \(2, 3\), one a token",
        ),
        (lambda: gspo_loss(ROWS, ROWS[:, :1], ROWS, ROWS), r"old_log_probs has shape \(2, 1\)"),
        (lambda: cispo_loss(ROWS, ROWS, ROWS, ROWS[:1]), r"mask has shape \(1, 3\)"),
        (
            lambda: cispo_loss(ROWS, ROWS, ROWS, ROWS, weights=ROWS[0]),
            r"weights has shape \(3,\); allowed: \(2, 3\)",
        ),
        (lambda: clipped_policy_loss(*[ROWS[0]] * 4), r"log_probs has shape \(3,\); allowed"),
        (lambda: negative_log_likelihood(ROWS, ROWS[0]), r"mask has shape \(3,\)"),
        (lambda: kl_penalty(ROWS, ROWS, "k4"), "kind='k4'; allowed: k1, k2, k3"),
        (lambda: kl_penalty(ROWS, ROWS[:1]), r"reference_log_probs has shape \(1, 3\)"),
        (lambda: rollout_correction(ROWS, ROWS, cap=0.0), "cap=0.0; allowed"),
    ],
)
def test_bad_arguments_are_named(call, message, monkeypatch):
    # Users run without the annotations checked, and get these lines instead.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_examples_in_docstrings():
    assert doctest.testmod(losses).failed == 0
