"""The forward pass: what each output may read, padding, caching, layout and a NumPy reference.

And scoring, which turns it into log-probabilities of response tokens aligned across heads.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from occ_jax.config import ModelConfig
from occ_jax.models import Model, num_parameters
from occ_jax.models.distributions import token_log_probs
from occ_jax.models.layers import norm
from occ_jax.models.responses import (
    auxiliary_masks,
    auxiliary_states,
    column_positions,
    trunk_states,
)
from occ_jax.models.rope import Rotary, rotate

ROWS, COLUMNS, VOCABULARY, MODULES = 3, 9, 16, 2
SMALL = ModelConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    intermediate_size=24,
    vocab_size=VOCABULARY,
    rope_theta=100.0,
    num_mtp_modules=MODULES,
)
# After the families of shared checkpoints; between them every option takes every value.
MIMO = dataclasses.replace(
    SMALL,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    mtp_concat="hidden_embed",
    mtp_trunk_hidden="pre_norm",
)
QWEN = dataclasses.replace(SMALL, num_kv_heads=1, qk_norm=True, tie_embeddings=True)
each_config = pytest.mark.parametrize("config", [MIMO, QWEN], ids=["mimo", "qwen"])

# Compiling is nearly all that these tests spend their time on: leave LLVM's optimisations out.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jit_model = functools.partial(jit, static_argnums=0)
_apply = jit_model(Model.apply, static_argnames="mtp_depth")
run_trunk = jit_model(Model.trunk)
run_module = jit_model(Model.mtp_module)


@jit_model
def full_forward(model, params, tokens, positions, valid):
    """Trunk output, what enters the modules, the modules' outputs, the embeddings."""
    out = model.trunk(params["trunk"], tokens, positions, valid)
    states = model.mtp_states(
        params, out.mtp_input[:, :-1], tokens, positions[:, :-1], valid, MODULES
    )
    return out.hidden, out.mtp_input, states, model.embed(params["trunk"], tokens)


def apply(model, params, tokens, lengths=None, **options):
    """`Model.apply` with lengths always given, so that padded and full rows share a compilation."""
    if lengths is None:
        lengths = np.full(len(tokens), tokens.shape[1])
    return _apply(model, params, tokens, jnp.asarray(lengths), **options)


def random_params(model, seed=0):
    """Parameters at which nothing is neutral: scales are not 1 and biases are not 0."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "scale":
                value = 1 + 0.3 * noise
            case "kernel":
                value = 1.5 * noise / np.sqrt(leaf.shape[0])
            case "bias" | "embedding":
                value = 0.5 * noise
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def random_tokens(seed=0, rows=ROWS, columns=COLUMNS):
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, columns))
    return jnp.asarray(tokens, jnp.int32)


def embedding_replaced(params, table):
    trunk = {**params["trunk"], "embed": {"embedding": table}}
    return {**params, "trunk": trunk}


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


# What an output reads.


@pytest.mark.parametrize(
    "config",
    [MIMO, dataclasses.replace(QWEN, num_layers=1, tie_embeddings=False)],
    ids=["mimo", "qwen-untied"],
)
def test_each_output_reads_exactly_the_tokens_it_may(config):
    # Every column holds a token of its own, so the gradient of an output with respect to row v of
    # the embedding table says whether it read the column of token v.
    model, columns = Model(config), 7
    params = random_params(model)
    tokens = jnp.asarray(np.random.default_rng(1).permutation(VOCABULARY)[:columns], jnp.int32)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal(VOCABULARY), jnp.float32)

    @jit
    @jax.jacrev
    def jacobians(table):
        out = model.apply(embedding_replaced(params, table), tokens[None])
        return [(logits @ weights)[0] for logits in (out.logits, *out.mtp_logits)]

    table = params["trunk"]["embed"]["embedding"]
    for k, jacobian in enumerate(jacobians(table)):  # k = 0 is the trunk
        reads = np.abs(jacobian).sum(-1)[:, tokens]
        slot, column = np.indices((columns - k, columns))
        np.testing.assert_array_equal(reads > 0, column <= slot + k)


@each_config
def test_modules_predict_further_ahead_in_shorter_arrays(config):
    model = Model(config)
    out = jax.eval_shape(
        model.apply, jax.eval_shape(model.init, jax.random.key(0)), random_tokens()
    )
    assert out.logits.shape == (ROWS, COLUMNS, VOCABULARY)
    assert out.hidden.shape == (ROWS, COLUMNS, config.hidden_size)
    assert [x.shape for x in out.mtp_logits] == [
        (ROWS, COLUMNS - k, VOCABULARY) for k in range(1, MODULES + 1)
    ]


def test_gradients_flow_between_depths_and_only_backwards():
    model = Model(MIMO)
    params, tokens = random_params(model), random_tokens()
    positions = jnp.broadcast_to(jnp.arange(COLUMNS - 1), (ROWS, COLUMNS - 1))
    mtp_input = np.random.default_rng(1).standard_normal((ROWS, COLUMNS - 1, MIMO.hidden_size))

    @jit
    @functools.partial(jax.jacrev, argnums=(0, 1))
    def jacobian(modules, mtp_input):
        states = model.mtp_states(
            *({**params, "mtp": modules}, mtp_input, tokens, positions),
            *(jnp.ones((ROWS, COLUMNS), bool), MODULES),
        )
        return jnp.stack([jnp.sum(state**2 * weights[:, : state.shape[1]]) for state in states])

    weights = jnp.asarray(np.random.default_rng(2).standard_normal(mtp_input.shape), jnp.float32)
    modules, inputs = jacobian(params["mtp"], jnp.asarray(mtp_input, jnp.float32))
    # The loss of module 1, then that of module 2.
    for leaf in jax.tree.leaves(modules[0]):
        assert np.any(leaf[0] != 0) and np.any(leaf[1] != 0)
    for leaf in jax.tree.leaves(modules[1]):
        np.testing.assert_array_equal(leaf[0], 0)
        assert np.any(leaf[1] != 0)
    # Both reach the trunk, from every slot that exists at their depth.
    slot = np.arange(COLUMNS - 1)
    for k in range(MODULES):
        reached = np.abs(inputs[k]).max(axis=-1) > 0
        np.testing.assert_array_equal(reached, np.tile(slot < COLUMNS - 1 - k, (ROWS, 1)))


# Padding.


@each_config
def test_right_padding_changes_nothing(config):
    model = Model(config)
    params, tokens, length = random_params(model), random_tokens(), 6
    padded = apply(model, params, tokens, [COLUMNS, length, 1])
    alone = apply(model, params, tokens[1:2, :length])
    close(padded.logits[1:2, :length], alone.logits)
    close(padded.hidden[1:2, :length], alone.hidden)
    for k in range(1, MODULES + 1):
        close(padded.mtp_logits[k - 1][1:2, : length - k], alone.mtp_logits[k - 1])


@each_config
def test_left_padding_changes_nothing(config):
    model = Model(config)
    params, tokens, length = random_params(model), random_tokens(), 6
    valid = jnp.asarray(np.arange(COLUMNS) >= [[0], [COLUMNS - length], [COLUMNS - 1]])
    out = run_trunk(model, params["trunk"], tokens, column_positions(valid), valid)
    alone = apply(model, params, tokens[1:2, -length:])
    close(out.mtp_input[1:2, -length:], alone.hidden)
    close(model.logits(params["trunk"], out.hidden[1:2, -length:]), alone.logits)


def test_positions_count_real_tokens():
    valid = jnp.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    expected = [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(column_positions(valid), expected)


# The cache.


def garbage_caches(model, params):
    """Caches of trunk and modules with room for all columns, full of large numbers."""
    at = jnp.zeros((ROWS, COLUMNS), jnp.int32)
    valid, hidden = at == 0, jnp.zeros((ROWS, COLUMNS, model.config.hidden_size))

    def written(params):
        modules = [
            model.mtp_module(params["mtp"][k], hidden, hidden, at, valid).cache
            for k in range(MODULES)
        ]
        return model.trunk(params["trunk"], at, at, valid).cache, modules

    def fill(x):
        return np.full(x.shape, 1e3, x.dtype)

    return jax.tree.map(fill, jax.eval_shape(written, params))


@each_config
@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_columns_equal_the_full_forward(config, chunk):
    model = Model(config)
    params, tokens = random_params(model), random_tokens()
    starts = np.array([0, 2, 4])
    valid = jnp.asarray(np.arange(COLUMNS) >= starts[:, None])
    positions = column_positions(valid)
    hidden, mtp_input, states, embeddings = full_forward(model, params, tokens, positions, valid)

    def pieces():
        for index in range(0, COLUMNS, chunk):
            yield index, slice(index, index + chunk)

    # Garbage in the cache shows any read of a column that is not written yet.
    cache, caches = garbage_caches(model, params)
    decoded = []
    for index, at in pieces():
        out = run_trunk(
            model, params["trunk"], tokens[:, at], positions[:, at], valid, cache, index
        )
        decoded.append(out.hidden)
        cache = out.cache
    decoded = np.concatenate(decoded, axis=1)
    for row, start in enumerate(starts):
        close(decoded[row, start:], hidden[row, start:])

    state = np.asarray(mtp_input)
    for k, module_cache in enumerate(caches, start=1):
        # The last k slots read no token that exists; nothing real comes after them.
        ahead = np.roll(embeddings, -k, axis=1)
        decoded = []
        for index, at in pieces():
            out = run_module(
                model,
                params["mtp"][k - 1],
                *(state[:, at], ahead[:, at], positions[:, at]),
                *(valid, module_cache, index),
            )
            module_cache = out.cache
            decoded.append(out.x)
        state = np.concatenate(decoded, axis=1)
        for row, start in enumerate(starts):
            close(state[row, start : COLUMNS - k], states[k - 1][row, start:])


# Layers, by hand.


def test_rms_norm_by_hand():
    # (3, 4): mean square 12.5, root 3.5355339; 3 / 3.5355339 = 0.8485281. With epsilon 12.5 the
    # root is 5. The scale multiplies afterwards.
    for epsilon, expected in ((1e-6, [[0.8485281, 1.1313708]]), (12.5, [[0.6, 0.8]])):
        layer = norm(dataclasses.replace(SMALL, rms_norm_eps=epsilon), 2, nnx.Rngs(params=0))
        layer.scale[...] = jnp.array([1.0, 10.0])
        close(layer(jnp.array([[3.0, 4.0]])), np.array(expected) * [1, 10])


def turns(dimensions):
    return Rotary(100.0 ** (-np.arange(0, dimensions, 2, dtype=np.float32) / dimensions), 1.0)


def test_rotary_positions_by_hand():
    # Pairs (0, 2) and (1, 3) turn by position * (1, theta^-1/2) = 2 * (1, 0.1) radians.
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    a, b = 2.0, 0.2
    expected = [
        1 * np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + 1 * np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    close(rotate(x, jnp.array([[2]]), turns(4)).ravel(), expected)


def test_rotation_keeps_norms_and_speaks_of_distances_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def at(x, position):
        return rotate(x, jnp.array([[position]]), turns(8)).ravel()

    for position in (0, 1, 17, 300):
        close(jnp.linalg.norm(at(query, position)), jnp.linalg.norm(query.ravel()))
    product = at(query, 5) @ at(key, 2)
    for shift in (1, 10, 100):
        close(at(query, 5 + shift) @ at(key, 2 + shift), product)
    assert abs(at(query, 6) @ at(key, 2) - product) > 1e-2


@each_config
def test_shifted_positions_leave_every_head_as_it_is(config):
    model = Model(config)
    params, tokens = random_params(model), random_tokens()
    valid = jnp.ones((ROWS, COLUMNS), bool)
    positions = jnp.broadcast_to(jnp.arange(COLUMNS), (ROWS, COLUMNS))

    @jit
    def states(trunk_positions, module_positions):
        out = model.trunk(params["trunk"], tokens, trunk_positions, valid)
        modules = model.mtp_states(
            *(params, out.mtp_input[:, :-1], tokens, module_positions[:, :-1], valid, MODULES)
        )
        return [out.hidden, *modules]

    plain = states(positions, positions)
    # A slot's position may be that of the state it reads, or of the token it reads.
    for shifted in (states(positions + 7, positions + 7), states(positions, positions + 1)):
        jax.tree.map(close, shifted, plain)
    stretched = states(positions, positions * 2)
    assert np.max(np.abs(stretched[1] - plain[1])) > 1e-2


# Options.


def test_concatenation_orders_differ_by_the_halves_of_the_projection():
    model = Model(MIMO)
    other = Model(dataclasses.replace(MIMO, mtp_concat="embed_hidden"))
    params, tokens = random_params(model), random_tokens()
    out = apply(model, params, tokens)

    def swapped(module):
        hidden, embed = jnp.split(module["projection"]["kernel"], 2)
        return {**module, "projection": {"kernel": jnp.concatenate([embed, hidden])}}

    halves_swapped = {**params, "mtp": {k: swapped(m) for k, m in params["mtp"].items()}}
    jax.tree.map(close, apply(other, halves_swapped, tokens), out)
    wrong = apply(other, params, tokens)
    np.testing.assert_array_equal(wrong.logits, out.logits)
    assert np.max(np.abs(wrong.mtp_logits[0] - out.mtp_logits[0])) > 1e-2


def test_the_first_module_reads_the_trunk_before_or_after_its_final_norm():
    before = Model(MIMO)
    after = Model(dataclasses.replace(MIMO, mtp_trunk_hidden="post_norm"))
    params, tokens = random_params(before), random_tokens()
    out_before, out_after = apply(before, params, tokens), apply(after, params, tokens)
    np.testing.assert_array_equal(out_before.logits, out_after.logits)
    close(reference_norm(out_before.hidden, params["trunk"]["final_norm"], MIMO), out_after.hidden)
    close(out_after.hidden @ params["trunk"]["head"]["kernel"], out_after.logits)
    assert np.max(np.abs(out_before.mtp_logits[0] - out_after.mtp_logits[0])) > 1e-2


def test_tied_embeddings_are_the_head():
    model = Model(QWEN)
    params, tokens = random_params(model), random_tokens()
    assert "head" not in params["trunk"]
    table = params["trunk"]["embed"]["embedding"]
    out = apply(model, params, tokens)
    close(out.logits, out.hidden @ table.T)
    positions = jnp.broadcast_to(jnp.arange(COLUMNS), (ROWS, COLUMNS))
    valid = jnp.ones((ROWS, COLUMNS), bool)
    _, _, states, embeddings = full_forward(model, params, tokens, positions, valid)
    np.testing.assert_array_equal(embeddings, np.asarray(table)[tokens])
    for logits, state in zip(out.mtp_logits, states, strict=True):
        close(logits, state @ table.T)


@pytest.mark.parametrize(("modules", "depth"), [(MODULES, -1), (0, 1)])
def test_a_depth_the_model_does_not_have_is_refused(modules, depth):
    model = Model(dataclasses.replace(SMALL, num_mtp_modules=modules))
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=f"mtp_depth is {depth}.*{modules} MTP modules"):
        model.apply(params, random_tokens(), mtp_depth=depth)


def test_modules_take_turns_beyond_their_number():
    two = Model(MIMO)
    params, tokens = random_params(two), random_tokens()
    four = Model(dataclasses.replace(MIMO, num_mtp_modules=4))
    repeated = {**params, "mtp": {k: params["mtp"][k % 2] for k in range(4)}}
    expected = apply(four, repeated, tokens).mtp_logits
    jax.tree.map(close, apply(two, params, tokens, mtp_depth=4).mtp_logits, expected)


def test_fewer_modules_are_the_first_ones():
    model = Model(MIMO)
    params, tokens = random_params(model), random_tokens()
    everything = apply(model, params, tokens)
    one = apply(model, params, tokens, mtp_depth=1)
    assert len(one.mtp_logits) == 1
    close(one.mtp_logits[0], everything.mtp_logits[0])
    none = apply(model, params, tokens, mtp_depth=0)
    assert none.mtp_logits == []
    close(none.logits, everything.logits)


def test_activations_may_be_bfloat16_but_logits_are_float32():
    model = Model(dataclasses.replace(MIMO, dtype="bfloat16", param_dtype="bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    out = jax.eval_shape(model.apply, params, random_tokens())
    assert out.hidden.dtype == jnp.bfloat16
    assert {x.dtype.name for x in (out.logits, *out.mtp_logits)} == {"float32"}


# Initial parameters.


def test_the_trunk_is_the_same_whatever_the_number_of_modules():
    drawn = [
        Model(dataclasses.replace(MIMO, num_mtp_modules=k)).init(jax.random.key(3))
        for k in range(3)
    ]
    for k, params in enumerate(drawn):
        jax.tree.map(np.testing.assert_array_equal, params["trunk"], drawn[0]["trunk"])
        assert list(params["mtp"]) == list(range(k))
    jax.tree.map(np.testing.assert_array_equal, drawn[1]["mtp"][0], drawn[2]["mtp"][0])
    # Nothing is drawn twice: trunk layers, modules.
    queries = [
        block["mixer"]["query"]["kernel"]
        for block in (
            *(layer[0] for layer in drawn[2]["trunk"]["layers"].values()),
            *(module["block"] for module in drawn[2]["mtp"].values()),
        )
    ]
    for i, query in enumerate(queries):
        for other in queries[:i]:
            assert np.all(query != other)


def test_number_of_parameters_by_hand():
    config = dataclasses.replace(MIMO, qk_norm=True)
    # Block: two norms 2*16; query 16*32 + 32; key and value 2*(16*16 + 16); output 32*16;
    # query and key norms 2*8; MLP 3*16*24. In all 32 + 544 + 544 + 512 + 16 + 1152.
    block = 2800
    trunk = 16 * 16 + 2 * block + 16 + 16 * 16  # embedding, blocks, final norm, head: 6128
    module = 3 * 16 + 32 * 16 + block  # norms, projection, block: 3360
    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    assert num_parameters(params["trunk"]) == trunk == 6128
    assert num_parameters(params) == trunk + 2 * module == 12848


# An independent forward pass, one row at a time, in float64.


def reference_norm(x, layer, config):
    x, scale = np.asarray(x, np.float64), np.asarray(layer["scale"], np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale


def reference_linear(x, layer):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer.get("bias", 0.0))


def reference_rotate(vector, position, config):
    """The half-split pairs as complex numbers, turned by exp(i position frequency)."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-2.0 * np.arange(half) / config.head_dim)
    turned = (vector[:half] + 1j * vector[half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag])


def reference_attention(x, layer, config):
    length, width = len(x), config.head_dim
    query, key, value = (
        reference_linear(x, layer[name]).reshape(length, -1, width)
        for name in ("query", "key", "value")
    )
    if config.qk_norm:
        query = reference_norm(query, layer["query_norm"], config)
        key = reference_norm(key, layer["key_norm"], config)
    mixed = np.zeros_like(query)
    for head in range(config.num_heads):
        shared = head // (config.num_heads // config.num_kv_heads)
        for i in range(length):
            turned = reference_rotate(query[i, head], i, config)
            scores = np.array(
                [turned @ reference_rotate(key[j, shared], j, config) for j in range(i + 1)]
            )
            weights = np.exp(scores / np.sqrt(width))
            mixed[i, head] = weights @ value[: i + 1, shared] / weights.sum()
    return reference_linear(mixed.reshape(length, -1), layer["output"])


def reference_block(x, layer, config):
    normed = reference_norm(x, layer["mixer_norm"], config)
    x = x + reference_attention(normed, layer["mixer"], config)
    normed = reference_norm(x, layer["feed_forward_norm"], config)
    gate = reference_linear(normed, layer["feed_forward"]["gate"])
    inner = gate / (1 + np.exp(-gate)) * reference_linear(normed, layer["feed_forward"]["up"])
    return x + reference_linear(inner, layer["feed_forward"]["down"])


@pytest.mark.parametrize(
    "options",
    [
        {"mtp_concat": "embed_hidden", "mtp_trunk_hidden": "post_norm"},
        {"mtp_concat": "hidden_embed", "mtp_trunk_hidden": "pre_norm"},
    ],
    ids=["deepseek", "mimo"],
)
def test_forward_equals_a_numpy_reference(options):
    config = dataclasses.replace(MIMO, qk_norm=True, rms_norm_eps=1e-2, **options)
    model = Model(config)
    params, tokens = random_params(model), random_tokens(rows=1)
    out = apply(model, params, tokens)
    theta = jax.tree.map(np.asarray, params["trunk"])
    embeddings = theta["embed"]["embedding"].astype(np.float64)[tokens[0]]
    x = embeddings
    for index in range(config.num_layers):
        x = reference_block(x, theta["layers"][index][0], config)
    hidden = reference_norm(x, theta["final_norm"], config)
    close(out.logits[0], reference_linear(hidden, theta["head"]))

    state = x if options["mtp_trunk_hidden"] == "pre_norm" else hidden
    for k in range(1, MODULES + 1):
        module = jax.tree.map(np.asarray, params["mtp"][k - 1])
        embed = reference_norm(embeddings[k:], module["embed_norm"], config)
        previous = reference_norm(state[: COLUMNS - k], module["hidden_norm"], config)
        pair = [embed, previous]
        if options["mtp_concat"] == "hidden_embed":
            pair = [previous, embed]
        u = reference_linear(np.concatenate(pair, axis=-1), module["projection"])
        state = reference_norm(
            reference_block(u, module["block"], config), module["final_norm"], config
        )
        close(out.mtp_logits[k - 1][0], reference_linear(state, theta["head"]))


# Scoring.


def test_token_log_probs_by_hand_and_by_gather():
    # Logits (0, ln 3): probabilities 1/4 and 3/4.
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]))
    close(token_log_probs(logits, jnp.array([[0, 1]])), np.log([[0.25, 0.75]]))

    rng = np.random.default_rng(0)
    logits = jnp.asarray(30 * rng.standard_normal((2, 5, VOCABULARY)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (2, 5)), jnp.int32)
    weights = jnp.asarray(rng.standard_normal((2, 5)), jnp.float32)

    def gathered(logits):
        log_probs = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]

    @jit
    def values_and_gradients(logits):
        value, pullback = jax.vjp(lambda x: token_log_probs(x, tokens), logits)
        expected, expected_pullback = jax.vjp(gathered, logits)
        return (value, pullback(weights)), (expected, expected_pullback(weights))

    jax.tree.map(close, *values_and_gradients(logits))


# A prompt of one token is shorter than the three that module 2 wants; responses end early.
PROMPT_COLUMNS, RESPONSE_COLUMNS = 5, 4
PROMPT_LENGTHS, RESPONSE_LENGTHS = np.array([1, 2, 5]), np.array([4, 2, 1])
LENGTHS = PROMPT_LENGTHS + RESPONSE_LENGTHS


def left_padded():
    """Rows as the sampler lays them out, and the same rows from column 0 on."""
    column = np.arange(PROMPT_COLUMNS + RESPONSE_COLUMNS)
    starts = (PROMPT_COLUMNS - PROMPT_LENGTHS)[:, None]
    valid = (column >= starts) & (column < PROMPT_COLUMNS + RESPONSE_LENGTHS[:, None])
    tokens = np.where(valid, random_tokens(5), 0)
    from_zero = np.stack(
        [np.roll(row, -start) for row, start in zip(tokens, starts[:, 0], strict=True)]
    )
    return jnp.asarray(tokens), jnp.asarray(valid), jnp.asarray(from_zero)


def counted(k):
    """Response tokens of `left_padded` by the rule: real, and at place k+1 of their row or later.

    k = 0 for the trunk.
    """
    response = np.arange(RESPONSE_COLUMNS)
    real = response < RESPONSE_LENGTHS[:, None]
    return real & (PROMPT_LENGTHS[:, None] + response >= k + 1)


def response_log_probs(model, params, tokens, valid):
    """Every head's log-probabilities of the response columns, [K+1, B, R]."""
    response = tokens[:, PROMPT_COLUMNS:]
    out = trunk_states(model, params["trunk"], tokens, valid)
    modules = auxiliary_states(
        model, params, out.mtp_input, tokens, valid, response_tokens=RESPONSE_COLUMNS
    )
    states = (out.hidden[:, -RESPONSE_COLUMNS:], *modules)
    return jnp.stack(
        [token_log_probs(model.logits(params["trunk"], state), response) for state in states]
    )


def plain_log_probs(model, params, from_zero):
    """The same numbers from `Model.apply` on rows padded on the right, 0 where uncounted."""
    out = model.apply(params, from_zero, jnp.asarray(LENGTHS))
    heads = []
    for k, logits in enumerate((out.logits, *out.mtp_logits)):
        row, response = np.nonzero(counted(k))
        place = PROMPT_LENGTHS[row] + response  # of the token in its row
        log_probs = jax.nn.log_softmax(logits)[row, place - k - 1, from_zero[row, place]]
        heads.append(jnp.zeros((ROWS, RESPONSE_COLUMNS)).at[row, response].set(log_probs))
    return jnp.stack(heads)


def test_auxiliary_masks_count_tokens_predicted_from_a_real_one():
    _, valid, _ = left_padded()
    masks = auxiliary_masks(valid, valid[:, PROMPT_COLUMNS:], MODULES)
    np.testing.assert_array_equal(masks, [counted(k) for k in range(1, MODULES + 1)])
    # By hand, the row with a prompt of one token: module k speaks of places k+1, k+2, ... only.
    np.testing.assert_array_equal(masks[:, 0], [[0, 1, 1, 1], [0, 0, 1, 1]])


def test_scores_are_those_of_the_unpadded_rows():
    model = Model(QWEN)
    params = random_params(model)
    tokens, valid, from_zero = left_padded()
    heads = jit_model(response_log_probs)(model, params, tokens, valid)
    expected = jit_model(plain_log_probs)(model, params, from_zero)
    assert heads.shape == (MODULES + 1, ROWS, RESPONSE_COLUMNS)
    close(np.where([counted(k) for k in range(MODULES + 1)], heads, 0), expected)


def test_gradients_of_scores_are_those_of_the_unpadded_rows():
    model = Model(dataclasses.replace(MIMO, num_layers=1))
    params = random_params(model)
    tokens, valid, from_zero = left_padded()
    # A last row that holds nothing: it may change nothing, and its numbers must be finite.
    padded_tokens, padded_valid = (jnp.pad(x, [(0, 1), (0, 0)]) for x in (tokens, valid))
    weights = np.random.default_rng(7).standard_normal((MODULES + 1, ROWS, RESPONSE_COLUMNS))
    weights = jnp.asarray(weights, jnp.float32)

    @jit
    @functools.partial(jax.grad, has_aux=True)
    def scored(params):
        heads = response_log_probs(model, params, padded_tokens, padded_valid)
        mask = padded_valid[:, PROMPT_COLUMNS:]
        masks = jnp.concatenate([mask[None], auxiliary_masks(padded_valid, mask, MODULES)])
        weighted = heads * jnp.pad(weights, [(0, 0), (0, 1), (0, 0)], constant_values=1.0)
        return jnp.sum(jnp.where(masks, weighted, 0.0)), heads

    @jit
    @jax.grad
    def plain(params):
        return jnp.sum(plain_log_probs(model, params, from_zero) * weights)

    gradients, heads = scored(params)
    assert np.all(np.isfinite(heads))
    jax.tree.map(lambda a, b: close(a, b, atol=3e-5), gradients, plain(params))
