"""The parts a layer may be made of, each against its definition, and their composition."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st

from occ_jax.config import (
    DeltaNetConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    YarnConfig,
)
from occ_jax.errors import UserError
from occ_jax.models import Model
from occ_jax.models.cache import extend
from occ_jax.models.delta_net import Signals, delta_chunks, delta_step
from occ_jax.models.layers import whole_tiles
from occ_jax.models.moe import MoE
from occ_jax.models.responses import (
    auxiliary_states,
    column_positions,
    distillation_losses,
    score_tokens,
    trunk_states,
)
from occ_jax.models.rope import Rotary, rotary, rotate
from occ_jax.models.transformer import Segment, layer_kinds, segments

BASE = ModelConfig(
    hidden_size=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    vocab_size=32,
)
# After DeepSeek-V3 and Qwen3-Next: between them every part that the dense families do not have.
DEEPSEEK = dataclasses.replace(
    BASE,
    yarn=YarnConfig(factor=4.0, original_max_positions=8, softmax_factor=1.3),
    latent_attention=LatentAttentionConfig(
        query_rank=12, kv_rank=10, nope_head_dim=6, rope_head_dim=4, value_head_dim=5
    ),
    moe=MoEConfig(
        num_experts=8,
        experts_per_token=3,
        intermediate_size=6,
        shared_intermediate_size=7,
        num_groups=4,
        groups_per_token=2,
        first_dense_layers=1,
        weight_scale=2.5,
    ),
)
NEXT = dataclasses.replace(
    BASE,
    num_layers=5,
    # A random delta net puts out next to nothing; its norm would magnify the last bits of that.
    rms_norm_eps=1e-2,
    zero_centered_norm=True,
    attention_gate=True,
    qk_norm=True,
    rope_fraction=0.5,
    delta_net=DeltaNetConfig(
        num_key_heads=2,
        num_value_heads=4,
        key_head_dim=4,
        value_head_dim=6,
        full_attention_interval=2,
        chunk_size=4,
    ),
    moe=MoEConfig(
        num_experts=6,
        experts_per_token=2,
        intermediate_size=6,
        shared_intermediate_size=5,
        shared_gate=True,
        router="softmax",
    ),
)
ROWS, COLUMNS = 3, 11
each_config = pytest.mark.parametrize("config", [DEEPSEEK, NEXT], ids=["deepseek", "next"])
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(model, seed=0):
    """Nothing neutral: biases and zero-centred scales are not 0."""
    rng = np.random.default_rng(seed)
    params = model.init(jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)


def tokens_of(config, seed=1):
    return jax.random.randint(jax.random.key(seed), (ROWS, COLUMNS), 0, config.vocab_size)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


# Rotary positions.


def test_interleaved_pairs_are_halves_in_another_order():
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
    positions = jnp.arange(6).reshape(2, 3)
    how = rotary(BASE, 8)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    close(rotate(x, positions, how, interleaved=True), rotate(x[..., order], positions, how))


def test_a_part_of_a_head_is_turned_and_the_rest_is_left():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    positions, how = jnp.arange(3)[None], Rotary(np.array([1.0, 0.1], np.float32), 1.0)
    turned = rotate(x, positions, how)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    close(turned[..., :4], rotate(x[..., :4], positions, how))


def test_yarn_by_hand():
    # theta 100, 8 dimensions, context 64 pi: a dimension turns r times at 8 ln(32/r) / (2 ln 100).
    # For r = 16 that is 0.60, for r = 1/2 it is 3.61; rounded outwards 0 and 4. So of the four
    # frequencies 100^(-i/4) the shares 0, 1/4, 1/2, 3/4 are divided by 8.
    yarn = YarnConfig(
        factor=8.0,
        original_max_positions=201,
        beta_fast=16.0,
        beta_slow=0.5,
        attention_factor=1.2,
    )
    how = rotary(dataclasses.replace(BASE, rope_theta=100.0, yarn=yarn), 8)
    plain, share = 100.0 ** (-np.arange(4) / 4), np.arange(4) / 4
    close(how.frequencies, plain * (1 - share) + plain / 8 * share)
    assert how.factor == 1.2
    x = jnp.ones((1, 1, 1, 8))
    close(rotate(x, jnp.zeros((1, 1), jnp.int32), how), 1.2 * x)


# Mixture of experts.


def moe_by_definition(params, moe, x):
    """Every expert on every token in float64, weighted; the router as the papers write it."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    def mlp(part, x, expert=None):
        gate, up, down = (
            part[name]["kernel"] if expert is None else part[name][expert]
            for name in ("gate", "up", "down")
        )
        gated = x @ gate
        return (gated * sigmoid(gated) * (x @ up)) @ down

    out, chosen = np.zeros_like(x), np.zeros((len(x), moe.experts_per_token), int)
    for i, row in enumerate(x):
        logits = row @ params["router"]["kernel"]
        if moe.router == "softmax":
            scores = np.exp(logits - logits.max())
            scores = choice = scores / scores.sum()
        else:
            scores = sigmoid(logits)
            choice = scores + params["router"]["correction_bias"]
        groups = choice.reshape(moe.num_groups, -1)
        best = np.sort(groups, axis=-1)[:, -2:].sum(-1)
        allowed = np.argsort(-best)[: moe.groups_per_token]
        outside = ~np.isin(np.arange(moe.num_experts) // groups.shape[1], allowed)
        chosen[i] = np.argsort(-np.where(outside, -np.inf, choice))[: moe.experts_per_token]
        weights = scores[chosen[i]] / (scores[chosen[i]].sum() if moe.normalize_weights else 1.0)
        for weight, expert in zip(weights, chosen[i], strict=True):
            out[i] += moe.weight_scale * weight * mlp(params["experts"], row, expert)
    if moe.shared_intermediate_size:
        shared = mlp(params["shared"], x)
        if moe.shared_gate:
            shared *= sigmoid(x @ params["shared_gate"]["kernel"])
        out += shared
    return out, chosen


@pytest.mark.parametrize(
    "config",
    [
        DEEPSEEK,
        NEXT,
        dataclasses.replace(
            BASE,
            moe=MoEConfig(
                num_experts=4,
                experts_per_token=1,
                intermediate_size=5,
                shared_intermediate_size=0,
                normalize_weights=False,
            ),
        ),
    ],
    ids=["grouped-sigmoid", "softmax", "one-expert"],
)
def test_experts_by_definition(config):
    layer = MoE(config, nnx.Rngs(params=0))
    if config.moe.router == "sigmoid":
        bias = jax.random.normal(jax.random.key(5), (config.moe.num_experts,))
        layer.router.correction_bias[...] = bias
    x = jax.random.normal(jax.random.key(1), (ROWS, COLUMNS, config.hidden_size))
    out, experts = layer(x)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    flat = np.asarray(x, np.float64).reshape(-1, config.hidden_size)
    expected, chosen = moe_by_definition(params, config.moe, flat)
    np.testing.assert_array_equal(
        np.sort(experts.reshape(chosen.shape), axis=-1), np.sort(chosen, axis=-1)
    )
    close(out.reshape(expected.shape), expected)


def test_no_token_is_dropped_when_all_want_the_same_expert():
    layer = MoE(DEEPSEEK, nnx.Rngs(params=0))
    layer.router.correction_bias[...] = jnp.array([9.0, 8.0, 7.0, 0, 0, 0, 0, 0])
    x = jax.random.normal(jax.random.key(1), (ROWS, COLUMNS, DEEPSEEK.hidden_size))
    out, experts = layer(x)
    np.testing.assert_array_equal(np.sort(experts, axis=-1), np.tile([0, 1, 2], (ROWS, COLUMNS, 1)))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    flat = np.asarray(x, np.float64).reshape(-1, DEEPSEEK.hidden_size)
    close(out.reshape(flat.shape), moe_by_definition(params, DEEPSEEK.moe, flat)[0])


def test_the_correction_bias_decides_and_gets_no_gradient():
    layer = MoE(DEEPSEEK, nnx.Rngs(params=0))
    graph, state = nnx.split(layer, nnx.Param)
    x = jax.random.normal(jax.random.key(1), (1, 5, DEEPSEEK.hidden_size))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x)[0] ** 2))(state)
    gradient = nnx.to_pure_dict(gradient)
    np.testing.assert_array_equal(gradient["router"]["correction_bias"], 0.0)
    assert np.any(gradient["router"]["kernel"] != 0)
    for part in gradient["experts"].values():
        assert np.any(part != 0)


def test_expert_load_counts_real_tokens():
    model = Model(DEEPSEEK)
    params, tokens = random_params(model), tokens_of(DEEPSEEK)
    valid = jnp.asarray(np.arange(COLUMNS) >= np.array([[0], [4], [9]]))
    load = trunk_states(model, params["trunk"], tokens, valid).expert_load
    assert load.shape == (3, 8)  # the first of four layers is dense
    counted = 10 + 6 + 1  # the last column predicts nothing and is not run
    np.testing.assert_array_equal(load.sum(axis=1), 3 * counted)


# The delta net.


def delta_by_definition(signals, state):
    """One column after the other, in float64."""
    query, key, value, log_decay, beta = (np.asarray(part, np.float64) for part in signals)
    state, out = np.array(state, np.float64), np.zeros_like(value)
    rows, columns, heads = beta.shape
    for b in range(rows):
        for h in range(heads):
            memory = state[b, h]
            for t in range(columns):
                memory = np.exp(log_decay[b, t, h]) * memory
                error = beta[b, t, h] * (value[b, t, h] - key[b, t, h] @ memory)
                memory = memory + np.outer(key[b, t, h], error)
                out[b, t, h] = query[b, t, h] @ memory
            state[b, h] = memory
    return out, state


def random_signals(columns, seed, decay):
    rng = np.random.default_rng(seed)
    shape = (2, columns, 3)
    key = rng.standard_normal((*shape, 4))
    signals = Signals(
        query=rng.standard_normal((*shape, 4)),
        key=key / np.linalg.norm(key, axis=-1, keepdims=True),
        value=rng.standard_normal((*shape, 5)),
        log_decay=-decay * rng.random(shape),
        beta=rng.random(shape),
    )
    state = rng.standard_normal((2, 3, 4, 5))
    return Signals(*(jnp.asarray(x, jnp.float32) for x in signals)), jnp.asarray(state, jnp.float32)


@given(
    columns=st.integers(1, 9),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 0.1, 3.0, 60.0]),
)
def test_chunks_are_the_recurrence(columns, size, seed, decay):
    signals, state = random_signals(columns, seed, decay)
    out, last = delta_chunks(signals, state, size)
    expected, expected_last = delta_by_definition(signals, state)
    close(out, expected, atol=3e-5)
    close(last, expected_last, atol=3e-5)


def test_single_columns_are_the_recurrence():
    signals, state = random_signals(6, 0, 1.0)
    expected, expected_last = delta_by_definition(signals, state)
    for t in range(6):
        out, state = delta_step(Signals(*(part[:, t : t + 1] for part in signals)), state)
        close(out[:, 0], expected[:, t])
    close(state, expected_last)


def test_gradients_of_chunks_are_those_of_the_recurrence():
    signals, state = random_signals(7, 1, 60.0)

    def by_steps(signals):
        memory, total = state, 0.0
        for t in range(7):
            out, memory = delta_step(Signals(*(part[:, t : t + 1] for part in signals)), memory)
            total += jnp.sum(jnp.sin(out))
        return total

    def by_chunks(signals):
        return jnp.sum(jnp.sin(delta_chunks(signals, state, 3)[0]))

    found, expected = jit(jax.grad(by_chunks))(signals), jit(jax.grad(by_steps))(signals)
    jax.tree.map(functools.partial(close, atol=3e-5), found, expected)


# Whole models.


def test_layers_of_mixed_models():
    kinds = [(kind.mixer, kind.feed_forward) for kind in layer_kinds(NEXT)]
    assert kinds == [("delta_net", "moe"), ("attention", "moe")] * 2 + [("delta_net", "moe")]
    kinds = [(kind.mixer, kind.feed_forward) for kind in layer_kinds(DEEPSEEK)]
    assert kinds == [("latent_attention", "dense")] + [("latent_attention", "moe")] * 3
    scanned = segments(dataclasses.replace(NEXT, scan_layers=True))
    kinds = layer_kinds(NEXT)
    assert scanned == (Segment(0, tuple(kinds[:2]), 2), Segment(4, (kinds[4],), 1))
    scanned = segments(dataclasses.replace(DEEPSEEK, scan_layers=True))
    assert [(s.first, len(s.pattern), s.repeats) for s in scanned] == [(0, 1, 1), (1, 1, 3)]


def outputs_and_gradients(model, params, tokens):
    def loss(params):
        out = model.apply(params, tokens)
        return jnp.sum(jnp.sin(out.logits)) + jnp.sum(jnp.cos(out.mtp_logits[0])), out

    return jit(jax.grad(loss, has_aux=True))(params)


def stack(model, theta):
    """Parameters of an unrolled trunk as the scanned model keeps them."""
    plain, layers = theta["layers"], {}
    for index, segment in enumerate(segments(model.config)):
        places = {}
        for place in range(len(segment.pattern)):
            numbers = [
                segment.first + place + len(segment.pattern) * i for i in range(segment.repeats)
            ]
            blocks = [plain[number][0] for number in numbers]
            many = len(blocks) > 1
            places[place] = jax.tree.map(lambda *x: jnp.stack(x), *blocks) if many else blocks[0]
        layers[index] = places
    return {**theta, "layers": layers}


@each_config
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_scanned_and_rematerialised_layers_are_the_same_function(config, remat):
    plain = Model(config)
    other = Model(dataclasses.replace(config, scan_layers=True, remat=remat))
    params, tokens = random_params(plain), tokens_of(config)
    stacked = {**params, "trunk": stack(other, params["trunk"])}
    gradients, out = outputs_and_gradients(plain, params, tokens)
    expected = {**gradients, "trunk": stack(other, gradients["trunk"])}
    found, other_out = outputs_and_gradients(other, stacked, tokens)
    jax.tree.map(functools.partial(close, atol=1e-4), other_out, out)
    # Layers multiply each other's rounding: it is a share of the largest entry, not of each.
    jax.tree.map(lambda a, b: close(a, b, atol=3e-5 * np.max(np.abs(b))), found, expected)


def test_initial_parameters_do_not_depend_on_how_layers_are_stacked():
    other = Model(dataclasses.replace(NEXT, scan_layers=True))
    drawn, stacked = Model(NEXT).init(jax.random.key(3)), other.init(jax.random.key(3))
    jax.tree.map(
        functools.partial(close, atol=1e-7), stack(other, drawn["trunk"]), stacked["trunk"]
    )


@each_config
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_decoding_from_a_widened_cache_is_the_full_forward(config, scan):
    # The rows are padded on the left; every prompt row is continued in two ways.
    model = Model(dataclasses.replace(config, scan_layers=scan))
    theta, tokens = random_params(model)["trunk"], tokens_of(config)
    prompt, copies = 6, 2
    valid = jnp.asarray(np.arange(COLUMNS) >= np.array([[0], [2], [4]]))
    positions = column_positions(valid)
    other = jnp.concatenate([tokens[:, :prompt], tokens[::-1, prompt:]], axis=1)
    both = jnp.stack([tokens, other], axis=1).reshape(-1, COLUMNS)
    wide = [jnp.repeat(x, copies, axis=0) for x in (positions, valid)]

    @jit
    def decode(theta):
        out = model.trunk(theta, *(x[:, :prompt] for x in (tokens, positions, valid)))
        cache = extend(out.cache, copies=copies, columns=COLUMNS - prompt)
        hidden = []
        for start, end in ((prompt, prompt + 1), (prompt + 1, COLUMNS - 1), (COLUMNS - 1, COLUMNS)):
            at = slice(start, end)
            out = model.trunk(theta, both[:, at], wide[0][:, at], wide[1], cache, start)
            cache = out.cache
            hidden.append(out.hidden)
        return jnp.concatenate(hidden, axis=1), model.trunk(theta, both, *wide).hidden

    found, expected = decode(theta)
    close(found, expected[:, prompt:], atol=3e-5)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [(128, 128), (10_239, 10_240), (121, 128), (115, 128), (112, 112), (9, 9)],
)
def test_columns_fill_their_tiles_where_that_costs_little(columns, wanted):
    x = jnp.ones((2, columns, 3))
    np.testing.assert_array_equal(
        whole_tiles(x), np.pad(x, [(0, 0), (0, wanted - columns), (0, 0)])
    )


@each_config
def test_columns_that_fill_tiles_change_nothing(config):
    # 121 columns become 128, the modules' 120 and 119 too.
    model = Model(dataclasses.replace(config, num_mtp_modules=2))
    params, columns, response = random_params(model), 122, 100
    tokens = jax.random.randint(jax.random.key(1), (2, columns), 0, config.vocab_size)
    valid = jnp.arange(columns)[None, :] >= jnp.array([[0], [15]])
    positions = column_positions(valid)

    @jit
    def filled(params):
        states = trunk_states(model, params["trunk"], tokens, valid)
        heads = auxiliary_states(model, params, states.mtp_input, tokens, valid, response)
        return states, heads

    @jit
    def bare(params):
        out = model.trunk(params["trunk"], tokens[:, :-1], positions[:, :-1], valid[:, :-1])
        embeddings, hidden, heads = model.embed(params["trunk"], tokens), out.mtp_input, []
        for k in (1, 2):
            slots = columns - 1 - k
            both = valid[:, :slots] & valid[:, k : k + slots]
            ahead = embeddings[:, k : k + slots]
            phi = params["mtp"][k - 1]
            hidden = model.mtp_module(phi, hidden[:, :slots], ahead, positions[:, :slots], both).x
            heads.append(hidden[:, -response:])
        return out.hidden, out.mtp_input, heads

    states, heads = filled(params)
    hidden, mtp_input, wanted = bare(params)
    real = valid[:, :-1, None]  # the others are of no meaning
    worst = 1e-4  # of entries up to 4: a random delta net's norm magnifies the last bits
    close(states.hidden * real, hidden * real, worst)
    close(states.mtp_input * real, mtp_input * real, worst)
    close(jnp.stack(heads), jnp.stack(wanted), worst)
    routed = valid[:, :-1].sum() * config.moe.experts_per_token
    np.testing.assert_array_equal(states.expert_load.sum(axis=1), routed)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_scores_some_columns_at_a_time_are_those_of_all_at_once(size, tie):
    plain = Model(dataclasses.replace(BASE, tie_embeddings=tie))
    pieces = Model(dataclasses.replace(plain.config, logits_columns=size))
    theta = random_params(plain)["trunk"]
    hidden, teacher = jax.random.normal(jax.random.key(2), (2, ROWS, 7, BASE.hidden_size))
    tokens = tokens_of(BASE)[:, :7]
    weights = jax.random.normal(jax.random.key(3), (3, ROWS, 7))

    @functools.partial(jit, static_argnums=0)
    def both(model, theta, hidden):
        def loss(theta, hidden):
            scores = score_tokens(model, theta, hidden, tokens, 0.7)
            distilled = distillation_losses(model, theta, teacher, hidden, 0.7)
            values = jnp.stack([scores.log_probs, scores.entropy, distilled])
            return jnp.sum(weights * values), (values, scores.best)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(theta, hidden)

    jax.tree.map(close, both(pieces, theta, hidden), both(plain, theta, hidden))


def test_no_array_over_columns_and_vocabulary_exists_in_pieces():
    config = dataclasses.replace(BASE, vocab_size=48, logits_columns=2)
    model, columns = Model(config), 12
    theta = jax.eval_shape(model.init, jax.random.key(0))["trunk"]
    hidden = jax.ShapeDtypeStruct((ROWS, columns, 16), jnp.float32)
    tokens = jax.ShapeDtypeStruct((ROWS, columns), jnp.int32)

    def largest(config):
        def loss(theta, hidden, tokens):
            scores = score_tokens(Model(config), theta, hidden, tokens)
            return jnp.sum(scores.log_probs + scores.entropy)

        text = str(jax.make_jaxpr(jax.grad(loss))(theta, hidden, tokens))
        shapes = set(re.findall(r"f32\[((?:\d+,){2,}48)\]", text)) - {"1,16,48"}  # the head
        return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)

    assert largest(config) <= ROWS * 2 * 48
    assert largest(dataclasses.replace(config, logits_columns=0)) == ROWS * columns * 48


# Bad configurations.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig(num_experts=8, num_groups=3), "model.moe.num_groups is 3"),
        (lambda: MoEConfig(num_experts=4, experts_per_token=5), "experts_per_token is 5"),
        (
            lambda: MoEConfig(num_experts=8, num_groups=4, experts_per_token=3),
            "groups_per_token is 1; it must be .* enough for 3 experts",
        ),
        (lambda: MoEConfig(num_groups=2, groups_per_token=2, router="softmax"), "num_groups is 2"),
        (lambda: DeltaNetConfig(num_key_heads=3), "num_key_heads is 3; it must be a divisor"),
        (lambda: LatentAttentionConfig(rope_head_dim=3), "rope_head_dim is 3; it must be even"),
        (lambda: dataclasses.replace(BASE, rope_fraction=0.1), "dimensions that RoPE turns"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
