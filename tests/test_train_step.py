"""One update against gradients, statistics and optimizer steps written out (`tests/one_update.py`).

Most updates run eagerly: every operation compiles once for all tests of this file, where a jitted
update compiles as a whole for every config.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import occ_jax.rl.gradients
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import make_mesh, state_shardings
from occ_jax.programs import make_programs
from occ_jax.rl.train_step import place_state, train_step
from tests.one_update import (
    MASKS,
    B,
    K,
    R,
    assert_close,
    assert_same_bits,
    calibration,
    coefficient,
    combine,
    copied,
    emitted,
    expected,
    inner,
    inputs,
    jit_update,
    make_batch,
    make_config,
    norm,
    oracle,
    parameters,
    start,
    update,
    with_coefficient,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Parts of the model as one operation each for eager updates, and no effort on fast code."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trunk", "mtp_module", "logits", "embed"):
            patch.setattr(Model, name, jax.jit(getattr(Model, name), static_argnums=0))
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def compiled_as_in_training(monkeypatch):
    """Takes `quick_compilation` back."""
    for name in ("trunk", "mtp_module", "logits", "embed"):
        monkeypatch.setattr(Model, name, getattr(Model, name).__wrapped__)
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


# --- detach ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tie", "depths"), [(False, (0, 1, 2)), (True, (0, 2))], ids=["untied", "tied"]
)
def test_detach_is_airtight_to_the_bit(tie, depths, compiled_as_in_training):
    trunks = []
    for modules in depths:
        # Clipping is active: one norm over trunk and modules would leak.
        config = make_config(
            modules, tie=tie, regime="detach", optimizer={"b1": 0.9, "eps": 1e-8, "clip_norm": 1e-3}
        )
        step = jax.jit(functools.partial(train_step, Model(config.model), config))
        state, batch = start(config), make_batch(modules)
        for _ in range(3):
            state, metrics = step(state, batch)
            assert metrics["actor/grad_norm"] > 1e-3
        trunks.append(state.params["trunk"])
        if modules:
            assert norm(state.params["mtp"]) != norm(parameters(modules, tie)["mtp"])
    assert norm(trunks[0]) != norm(parameters(0, tie)["trunk"])
    for other in trunks[1:]:
        assert_same_bits(other, trunks[0])


# --- fixed coefficients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "weight", "head_loss"),
    [
        ("detach", 0.0, "distill"),
        ("detach", 0.0, "policy"),
        ("ce", -0.4, "ce"),
        ("ce", 0.5, "policy"),
        ("policy", 0.7, "ce"),
        ("policy", 0.7, "policy"),
    ],
)
def test_gradients_are_those_of_the_losses_written_out(regime, weight, head_loss):
    config = make_config(regime=regime, coefficient=weight, head_loss=head_loss)
    state, metrics = update(config, make_batch())
    want = expected()
    h = want.h_ce if regime == "ce" else want.h_policy
    assert_close(emitted(state), combine(want.g, h, [weight] * K))
    # The policy loss of the head carries the coefficient where the trunk has one.
    scale = weight if regime == "policy" else 1.0
    phi = {
        "ce": want.phi_ce,
        "distill": want.phi_distill,
        "policy": jax.tree.map(lambda x, y: scale * (x + y), *want.phi_policy),
    }[head_loss]
    assert_close(emitted(state, "mtp"), phi)
    for name in ("loss", "pg_loss"):
        np.testing.assert_allclose(metrics[f"actor/{name}"], want.losses["rl"], rtol=1e-5)
    for k in range(K):
        np.testing.assert_allclose(
            metrics[f"mtp_losses/mtp_{k + 1}_loss"], want.losses["ce"][k], rtol=1e-5
        )
        np.testing.assert_allclose(metrics[f"mtp/agreement_{k + 1}"], want.agreement[k], rtol=1e-5)
        if regime != "detach":
            np.testing.assert_allclose(metrics[f"occ/coefficient_{k + 1}"], weight, rtol=1e-6)
            name = regime if regime == "ce" else "policy"
            np.testing.assert_allclose(
                metrics[f"mtp/policy_loss_{k + 1}"], want.losses[name][k], rtol=1e-5
            )


def test_the_ratio_can_start_from_the_main_heads_old_log_probs():
    config = make_config(regime="policy", coefficient=0.7, auxiliary_ratio="main")
    state, _ = update(config, make_batch(old_auxiliary_log_probs=None))
    want = oracle(parameters(), inputs()._replace(old_auxiliary=np.stack([inputs().old] * K)))
    assert_close(emitted(state), combine(want.g, want.h_policy, [0.7] * K))


@pytest.mark.parametrize(
    "mtp",
    [{"regime": "policy", "coefficient": 0.0}, {"estimator": "log_prob"}],
    ids=["policy", "log_prob at its first update"],
)
def test_a_coefficient_of_zero_is_no_auxiliary_loss(mtp):
    detached, _ = update(make_config(regime="detach"), make_batch())
    state, _ = update(make_config(**mtp), make_batch())
    assert_close(state.params, detached.params, rtol=1e-7)
    assert_close(emitted(state), emitted(detached), rtol=1e-6)


def test_the_entropy_bonus_leaves_the_modules_losses_in_place():
    mtp = {"regime": "policy", "coefficient": 0.7}
    plain, _ = update(make_config(**mtp), make_batch())
    state, metrics = update(
        make_config(algorithm={"entropy_coefficient": 0.3}, **mtp), make_batch()
    )
    want = expected()
    total = jax.tree.map(lambda g, entropy: g - 0.3 * entropy, want.g, want.entropy)
    assert_close(emitted(state), combine(total, want.h_policy, [0.7] * K))
    assert_same_bits(emitted(state, "mtp"), emitted(plain, "mtp"))
    np.testing.assert_allclose(metrics["actor/entropy"], want.losses["entropy"], rtol=1e-5)
    loss = want.losses["rl"] - 0.3 * want.losses["entropy"]
    np.testing.assert_allclose(metrics["actor/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/pg_loss"], want.losses["rl"], rtol=1e-5)


def test_the_kl_penalty_is_added_to_the_main_loss():
    config = make_config(
        regime="policy", coefficient=0.7, algorithm={"kl_coefficient": 0.2, "kl_estimator": "k3"}
    )
    state, metrics = update(config, make_batch(reference=True))
    want = expected()
    total = jax.tree.map(lambda g, kl: g + 0.2 * kl, want.g, want.kl)
    assert_close(emitted(state), combine(total, want.h_policy, [0.7] * K))
    np.testing.assert_allclose(metrics["actor/kl_loss"], want.losses["kl"], rtol=1e-5)
    loss = want.losses["rl"] + 0.2 * want.losses["kl"]
    np.testing.assert_allclose(metrics["actor/loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/pg_loss"], want.losses["rl"], rtol=1e-5)


# --- occ by gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [1, 2])
def test_exact_measures_inner_products_and_adds_what_they_say(modules, monkeypatch):
    passes = []

    def counted(name):
        function = getattr(occ_jax.rl.gradients, name)
        return lambda *arguments: passes.append(name) or function(*arguments)

    for name in ("trunk_states", "module_states"):
        monkeypatch.setattr(occ_jax.rl.gradients, name, counted(name))
    eps = 0.01
    config = make_config(modules, eps=eps, optimizer={"clip_norm": 0.5, "b1": 0.9})
    state, metrics = update(config, make_batch(modules))
    assert passes == ["trunk_states", "module_states"]  # one forward, several pullbacks
    g, h = expected().g, expected().h_policy[:modules]
    c = np.array([inner(g, x) for x in h])
    penalty = np.array([[inner(x, y) for y in h] for x in h])
    weights = np.linalg.solve(penalty + eps * np.eye(modules), c)
    if modules == 1:
        np.testing.assert_allclose(weights, c / (norm(h[0]) ** 2 + eps))
    ratios = np.abs(weights) * np.sqrt(np.diag(penalty)) / norm(g)
    for k in range(modules):
        for name, value in (
            ("coefficient", weights[k]),
            ("correlation", c[k]),
            ("cosine", c[k] / norm(g) / norm(h[k])),
            ("step_ratio", ratios[k]),
        ):
            np.testing.assert_allclose(metrics[f"occ/{name}_{k + 1}"], value, rtol=1e-4)
        for other in range(k, modules):
            np.testing.assert_allclose(
                metrics[f"occ/penalty_{k + 1}_{other + 1}"], penalty[k, other], rtol=1e-4, atol=1e-6
            )
    gain = weights @ c - 0.5 * weights @ penalty @ weights
    np.testing.assert_allclose(metrics["occ/predicted_gain"], gain, rtol=1e-4)
    np.testing.assert_allclose(metrics["actor/grad_norm"], norm(g), rtol=1e-5)
    assert metrics["occ/non_finite"] == 0
    np.testing.assert_allclose(calibration(state).coefficient, weights, rtol=1e-4)
    # The step: clipped after the two are combined, then adamw.
    theta, total = parameters()["trunk"], combine(g, h, weights)
    assert norm(total) > 0.5
    by_hand = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.1, b1=0.9, eps=1.0, weight_decay=0.01)
    )
    step, _ = by_hand.update(total, by_hand.init(theta), theta)
    assert_close(state.params["trunk"], optax.apply_updates(theta, step), rtol=1e-6)
    assert_close(jax.tree.map(jnp.subtract, state.params["trunk"], theta), step, rtol=1e-4)


def test_between_measurements_the_last_coefficient_holds():
    config = make_config(decay=0.9)
    state = with_coefficient(start(config), [0.3, -0.2])
    after, metrics = update(config, make_batch(), state, measure=False)
    assert_close(emitted(after), combine(expected().g, expected().h_policy, [0.3, -0.2]))
    assert_same_bits(calibration(after), calibration(state))
    np.testing.assert_allclose(metrics["occ/coefficient_2"], -0.2, rtol=1e-6)
    assert not any(name.startswith(("occ/corr", "occ/pen", "occ/cos")) for name in metrics)
    measured, _ = update(config, make_batch(), state, measure=True)
    assert int(calibration(measured).count) == 1
    assert not np.allclose(coefficient(measured), coefficient(state))


def test_as_published_the_head_starves_with_the_coefficient():
    config = make_config(head_loss="policy", estimator="log_prob")
    state = with_coefficient(start(config), [0.5, 0.0])
    after, _ = update(config, make_batch(), state)
    first, second = expected().phi_policy
    del second
    assert_close(emitted(after, "mtp")[0], jax.tree.map(lambda x: 0.5 * x, first[0]))
    assert norm(emitted(after, "mtp")[1]) == 0


# --- occ by log-probabilities ---------------------------------------------------------------------


def log_prob_statistics_by_hand(now):
    """c [K] and G [K, K] from an oracle, token by token."""
    c, penalty = np.zeros(K), np.zeros((K, K))
    for b, j in zip(*np.nonzero(MASKS[0]), strict=True):
        delta = float(now.log_probs[b, j] - inputs().old[b, j])
        each = [
            float(now.auxiliary_log_probs[k, b, j] - inputs().old_auxiliary[k, b, j])
            if MASKS[k + 1, b, j]
            else 0.0
            for k in range(K)
        ]
        c += [delta * x for x in each]
        penalty += np.outer(each, each)
    return c, penalty


def test_log_prob_uses_the_statistics_of_updates_before_this_one():
    config = make_config(estimator="log_prob", decay=0.5, eps=1e-3)
    batch, eps = make_batch(), 1e-3 * np.eye(K)
    first, metrics = update(config, batch)
    c, penalty = log_prob_statistics_by_hand(expected())
    np.testing.assert_allclose(
        [metrics["occ/correlation_1"], metrics["occ/correlation_2"]], c, rtol=1e-4
    )
    np.testing.assert_allclose(
        [metrics[f"occ/penalty_{name}"] for name in ("1_1", "1_2", "2_2")],
        penalty[np.triu_indices(2)],
        rtol=1e-4,
    )
    assert metrics["occ/coefficient_1"] == metrics["occ/coefficient_2"] == 0
    assert_close(emitted(first), expected().g)
    weights = np.linalg.solve(penalty + eps, c)
    np.testing.assert_allclose(coefficient(first), weights, rtol=1e-4)

    second, metrics = update(config, batch, first)
    now = oracle(first.params, inputs())
    assert_close(emitted(second), combine(now.g, now.h_policy, weights), rtol=1e-4)
    for k in range(K):
        np.testing.assert_allclose(metrics[f"occ/coefficient_{k + 1}"], weights[k], rtol=1e-4)
    # Debiased averages of two measurements with decay 1/2: weights 1/3 and 2/3.
    new_c, new_penalty = log_prob_statistics_by_hand(now)
    c, penalty = (c + 2 * new_c) / 3, (penalty + 2 * new_penalty) / 3
    np.testing.assert_allclose(calibration(second).correlation, c, rtol=1e-4)
    np.testing.assert_allclose(coefficient(second), np.linalg.solve(penalty + eps, c), rtol=1e-3)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy_loss", ["clipped", "cispo", "gspo"])
def test_token_weights_multiply_the_policy_losses_of_every_head(policy_loss):
    aggregation = "seq-mean-token-mean" if policy_loss == "gspo" else "token-mean"
    algorithm = {"policy_loss": policy_loss, "aggregation": aggregation}
    config = make_config(regime="policy", coefficient=0.7, algorithm=algorithm)
    plain, _ = update(config, make_batch())
    half, _ = update(config, make_batch(weights=jnp.full((B, R), 0.5)))
    assert_close(emitted(half), jax.tree.map(lambda x: 0.5 * x, emitted(plain)))
    # The cross-entropy that trains the modules is none of them.
    assert_same_bits(half.params["mtp"], plain.params["mtp"])


# --- micro-batches --------------------------------------------------------------------------------


AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


@pytest.mark.parametrize(
    ("modules", "aggregation", "mtp"),
    [
        *((0, aggregation, {"regime": "detach"}) for aggregation in AGGREGATIONS),
        # The policy objective on the modules, in all four, whichever way lambda comes about.
        (1, "token-mean", {"regime": "policy"}),
        (1, "seq-mean-token-mean", {"regime": "policy"}),
        (1, "seq-mean-token-sum", {"estimator": "log_prob", "head_loss": "policy"}),
        (1, "seq-mean-token-sum-norm", {"estimator": "exact"}),
        (1, "token-mean", {"regime": "ce", "head_loss": "distill"}),
    ],
)
def test_micro_batches_add_up_to_the_mini_batch(modules, aggregation, mtp):
    whole = make_config(modules, algorithm={"aggregation": aggregation}, **mtp)
    split = make_config(modules, 2, algorithm={"aggregation": aggregation}, **mtp)
    state = start(whole)
    if mtp.get("estimator") == "log_prob":
        state = with_coefficient(state, [0.6])
    want, want_metrics = update(whole, make_batch(modules), state)
    got, metrics = jit_update(split, make_batch(modules), state)
    assert_close(got.params, want.params, rtol=1e-6)
    assert_close(emitted(got), emitted(want), rtol=1e-5)
    assert_close(emitted(got, "mtp"), emitted(want, "mtp"), rtol=1e-5)
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_cross_batch_is_the_mean_over_pairs_of_different_micro_batches():
    count = 4
    config = make_config(1, count, estimator="cross_batch")
    state, metrics = jit_update(config, make_batch(1))
    each = []
    for m in range(count):
        rows = (np.arange(B) // (B // count) == m).astype(np.float32)
        each.append(oracle(parameters(), inputs()._replace(rows=rows)))
    # Losses are divided by the mini-batch's denominator: g_m, the estimate that micro-batch m gives
    # of the whole gradient, is M times its share.
    pairs = [
        count**2 * inner(each[m].g, each[n].h_policy[0])
        for m, n in itertools.permutations(range(count), 2)
    ]
    c, square = np.mean(pairs), norm(expected().h_policy[0]) ** 2
    np.testing.assert_allclose(metrics["occ/correlation_1"], c, rtol=1e-4)
    np.testing.assert_allclose(metrics["occ/penalty_1_1"], square, rtol=1e-4)
    np.testing.assert_allclose(metrics["occ/coefficient_1"], c / (square + 1e-8), rtol=1e-4)
    assert_close(
        emitted(state), combine(expected().g, expected().h_policy[:1], [c / square]), rtol=1e-4
    )
    # Far from what the same samples say of themselves.
    same = inner(expected().g, expected().h_policy[0])
    assert abs(same - c) > 0.1 * abs(c)
    cosine = same / norm(expected().g) / np.sqrt(square)
    np.testing.assert_allclose(metrics["occ/cosine_1"], cosine, rtol=1e-4)


# --- padding, empty batches, what is not finite ---------------------------------------------------


@pytest.mark.parametrize("estimator", ["exact", "log_prob"])
def test_padding_reaches_nothing(estimator):
    config = make_config(estimator=estimator, algorithm={"kl_coefficient": 0.1})
    state = start(config)
    if estimator == "log_prob":
        state = with_coefficient(state, [0.5, -0.5])
    want = update(config, make_batch(reference=True), state)
    got = update(config, make_batch(reference=True, padding=np.nan, pad_token=7), state)
    assert got[1]["actor/skipped"] == 0
    assert_same_bits(got, want)


@pytest.mark.parametrize(
    "mtp",
    [
        {"regime": "detach", "head_loss": "distill"},
        {"regime": "ce"},
        {"estimator": "exact"},
        {"estimator": "log_prob", "head_loss": "policy"},
    ],
)
def test_a_mini_batch_without_a_trained_token_has_zero_gradients(mtp):
    config = make_config(**mtp)
    batch = make_batch(padding=np.nan, response_mask=jnp.zeros((B, R), bool))
    state, metrics = update(config, batch)
    for group in ("trunk", "mtp"):
        assert norm(emitted(state, group)) == 0
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["actor/skipped"] == metrics["actor/grad_norm"] == metrics["actor/pg_loss"] == 0


@pytest.mark.parametrize(
    "mtp", [{"regime": "detach"}, {"estimator": "exact"}, {"estimator": "log_prob"}]
)
def test_a_loss_that_is_not_finite_skips_the_update(mtp):
    config = make_config(decay=0.5, **mtp)
    before, _ = update(config, make_batch())
    bad = make_batch(advantages=make_batch().advantages.at[2].set(jnp.nan))
    after, metrics = update(config, bad, before)
    assert_same_bits(after.params, before.params)
    assert_same_bits(after.opt_state, before.opt_state)
    assert metrics["actor/skipped"] == 1
    assert int(after.step) == int(before.step) + 1 == 2
    again, metrics = update(config, make_batch(), after)
    assert metrics["actor/skipped"] == 0
    assert_same_bits(again.params, update(config, make_batch(), before)[0].params)


def test_an_auxiliary_gradient_that_is_not_finite_leaves_the_main_update_alone():
    config = make_config(decay=0.5)
    state = with_coefficient(start(config), [0.5, 0.5])
    old = make_batch().old_auxiliary_log_probs.at[1, 0, 0].set(jnp.nan)
    after, metrics = update(config, make_batch(old_auxiliary_log_probs=old), state)
    assert metrics["occ/non_finite"] == 1 and metrics["actor/skipped"] == 0
    assert_close(emitted(after), expected().g)
    assert_close(emitted(after, "mtp"), expected().phi_ce)
    assert metrics["occ/coefficient_1"] == metrics["occ/coefficient_2"] == 0
    assert_same_bits(calibration(after), calibration(state))


# --- compiled -------------------------------------------------------------------------------------


@functools.cache
def compiled_steps():
    """What training runs, on one device: updates with and without a measurement."""
    config = make_config(1, measure_every=2)
    mesh = make_mesh(config.mesh)
    programs = make_programs(config, mesh, (1,), 0)
    return config, mesh, [programs.update, programs.update_between]


@pytest.mark.parametrize("measure", [True, False])
def test_compiled_and_eager_updates_agree(measure):
    config, mesh, steps = compiled_steps()
    state = with_coefficient(start(config), [0.4])
    want, want_metrics = update(config, make_batch(1), state, measure)
    placed = place_state(config, copied(parameters(1), mesh), 0, mesh)
    placed = jax.device_put(with_coefficient(placed, [0.4]), state_shardings(mesh, placed))
    got, metrics = steps[not measure](placed, make_batch(1))
    assert_close(got.params, want.params, rtol=1e-6)
    assert_close(emitted(got), emitted(want))
    assert_close(emitted(got, "mtp"), emitted(want, "mtp"))
    assert_close(calibration(got), calibration(want))
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, want_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_updates_are_repeatable_to_the_bit_and_compile_once_a_kind():
    config, mesh, steps = compiled_steps()
    ends = []
    for _ in range(2):
        state = place_state(config, copied(parameters(1), mesh), 0, mesh)
        for t in range(4):
            before = state
            state, _ = steps[t % 2](state, make_batch(1))
            assert before.params["trunk"]["embed"]["embedding"].is_deleted()  # donated
        ends.append(state)
    assert int(ends[0].step) == 4 and int(calibration(ends[0]).count) == 2
    assert_same_bits(ends[1], ends[0])
    assert_same_bits(ends[0].key, jax.random.key(0))
    assert [step._cache_size() for step in steps] == [1, 1]
    assert not parameters(1)["trunk"]["embed"]["embedding"].is_deleted()


def test_bfloat16_parameters_are_measured_in_float32():
    config = make_config(1, 2, estimator="cross_batch", decay=0.5)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, param_dtype="bfloat16")
    )
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
    state = start(config, {"trunk": rounded["trunk"], "mtp": {0: rounded["mtp"][0]}})
    want = oracle(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), inputs())
    step = jax.jit(functools.partial(train_step, Model(config.model), config))
    types = jax.tree.map(lambda x: x.dtype, state)
    for t in range(2):
        state, metrics = step(state, make_batch(1))
        assert metrics["actor/skipped"] == 0
        assert jax.tree.map(lambda x: x.dtype, state) == types
        assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
        assert int(calibration(state).count) == t + 1
        if t == 0:
            # Only the gradients' entries are rounded, by 2^-9 each; their sums are not.
            np.testing.assert_allclose(
                metrics["occ/penalty_1_1"], norm(want.h_policy[0]) ** 2, rtol=1e-3
            )
            np.testing.assert_allclose(metrics["actor/grad_norm"], norm(want.g), rtol=1e-3)
    assert step._cache_size() == 1
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in calibration(state)[1:]} == {jnp.dtype("float32")}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_types_do_not_drift_with_bfloat16_throughout(micro_batches):
    config = make_config(2, micro_batches, head_loss="distill")
    narrow = dataclasses.replace(config.model, param_dtype="bfloat16", dtype="bfloat16")
    config = dataclasses.replace(config, model=narrow)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
    for measure in (True, False):
        state = start(config, params)
        step = functools.partial(train_step, Model(narrow), config, measure=measure)
        after, metrics = jax.eval_shape(step, state, make_batch())
        types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (after, state)]
        assert types[0] == types[1]
        assert {(x.shape, x.dtype) for x in metrics.values()} == {((), jnp.dtype("float32"))}
