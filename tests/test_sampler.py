"""Sampling: its log-probabilities are the trainer's, its tokens follow the model, rows end well."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ_jax.config import ModelConfig
from occ_jax.models import Model
from occ_jax.models.distributions import token_log_probs
from occ_jax.models.responses import (
    auxiliary_masks,
    auxiliary_states,
    trunk_states,
)
from occ_jax.rollout import sample
from occ_jax.rollout.sampler import sample_in_chunks

PAD, EOS, NEVER = 0, 1, -1
VOCABULARY, MODULES = 16, 2
CONFIG = ModelConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    vocab_size=VOCABULARY,
    qkv_bias=True,
    qk_norm=True,
    num_mtp_modules=MODULES,
    mtp_trunk_hidden="pre_norm",
)
MODEL = Model(CONFIG)
GROUP, NEW_TOKENS = 4, 6
# The prompt of one token is shorter than the MODULES + 1 that module 2 wants before a token.
PROMPT_LENGTHS = np.array([5, 3, 1])
PROMPT_COLUMNS = 5
ROWS = GROUP * len(PROMPT_LENGTHS)

# Compiling is most of what these tests spend their time on: leave LLVM's optimisations out.
jit_model = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
_sample = jit_model(
    sample,
    static_argnames=(
        *("group_size", "max_new_tokens", "temperature", "eos_ids", "pad_id", "auxiliary"),
    ),
)


def run(
    params,
    prompts,
    *,
    seed=0,
    key=None,
    temperature=1.0,
    group_size=GROUP,
    max_new_tokens=NEW_TOKENS,
    eos_ids=(EOS,),
    auxiliary=True,
):
    """Defaults that most tests share, so that they share their compilation."""
    return _sample(
        MODEL,
        params,
        *prompts,
        jax.random.key(seed) if key is None else key,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_ids=eos_ids,
        pad_id=PAD,
        auxiliary=auxiliary,
    )


@jit_model
def trainer_log_probs(model, params, tokens, valid, temperature):
    """Log-probabilities of the response as the train step computes them, [K+1, B, R]."""
    response = tokens[:, PROMPT_COLUMNS:]
    out = trunk_states(model, params["trunk"], tokens, valid)
    modules = auxiliary_states(model, params, out.mtp_input, tokens, valid, NEW_TOKENS)
    return jnp.stack(
        [
            token_log_probs(model.logits(params["trunk"], state) / temperature, response)
            for state in (out.hidden[:, -NEW_TOKENS:], *modules)
        ]
    )


apply = jit_model(Model.apply, static_argnames="mtp_depth")


@pytest.fixture(scope="module")
def params():
    """Parameters at which nothing is neutral: scales are not 1 and biases are not 0."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.standard_normal(leaf.shape)
        match path[-1].key:
            case "scale":
                value = 1 + 0.3 * noise
            case "kernel":
                value = noise / np.sqrt(leaf.shape[0])
            case "bias" | "embedding":
                value = 0.5 * noise
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def padded(columns=PROMPT_COLUMNS, lengths=PROMPT_LENGTHS, seed=0):
    """Left-padded random prompts: (tokens, valid)."""
    drawn = np.random.default_rng(seed).integers(2, VOCABULARY, (len(lengths), 20))
    valid = np.arange(columns) >= columns - np.asarray(lengths)[:, None]
    tokens = np.where(valid, drawn[:, -columns:], PAD)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def truncated(response, *eos_ids):
    """What endless completions must become where any of `eos_ids` ends rows: (tokens, mask)."""
    is_end = np.isin(np.asarray(response), eos_ids)
    mask = np.cumsum(is_end, axis=1) - is_end == 0  # no end before this column
    return np.where(mask, response, PAD), mask


# 0 is greedy, and its log-probabilities are the untempered ones.
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_the_trainers(params, temperature):
    rollout = run(params, padded(), temperature=temperature)
    scale = 1.0 if temperature == 0 else temperature
    expected = trainer_log_probs(MODEL, params, rollout.tokens, rollout.valid, scale)
    mask = rollout.response_mask
    close(rollout.log_probs, np.where(mask, expected[0], 0))

    auxiliary = rollout.auxiliary_log_probs
    assert auxiliary.shape == (MODULES, ROWS, NEW_TOKENS)
    assert auxiliary.dtype == rollout.log_probs.dtype == jnp.float32
    counted = np.asarray(auxiliary_masks(rollout.valid, mask, MODULES))
    assert np.any(counted != np.asarray(mask)), "no prompt is short enough to matter"
    close(np.where(counted, auxiliary, 0), np.where(counted, expected[1:], 0))
    assert np.all(np.isfinite(auxiliary))
    np.testing.assert_array_equal(np.where(mask, 0, auxiliary), 0)
    np.testing.assert_array_equal(np.where(mask, 0, rollout.log_probs), 0)


def test_rows_end_with_their_end_of_sequence_token(params):
    prompts, prompt_valid = padded()
    rollout = run(params, (prompts, prompt_valid))
    response = np.asarray(rollout.tokens[:, PROMPT_COLUMNS:])
    ended = np.any(response == EOS, axis=1)
    assert 0 < ended.sum() < ROWS, "choose another seed: rows must end early and late"
    for row, mask, log_probs in zip(
        response, rollout.response_mask, rollout.log_probs, strict=True
    ):
        length = int(mask.sum())
        np.testing.assert_array_equal(mask, np.arange(NEW_TOKENS) < length)
        assert EOS not in row[: length - 1]
        assert length == NEW_TOKENS or row[length - 1] == EOS
        np.testing.assert_array_equal(row[length:], PAD)
        np.testing.assert_array_equal(log_probs[length:], 0)
        assert np.all(log_probs[:length] < 0)
    assert rollout.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(rollout.valid[:, PROMPT_COLUMNS:], rollout.response_mask)


def test_rows_of_a_prompt_are_neighbours(params):
    prompts, prompt_valid = padded()
    rollout = run(params, (prompts, prompt_valid))
    np.testing.assert_array_equal(
        rollout.tokens[:, :PROMPT_COLUMNS], np.repeat(prompts, GROUP, axis=0)
    )
    np.testing.assert_array_equal(
        rollout.valid[:, :PROMPT_COLUMNS], np.repeat(prompt_valid, GROUP, axis=0)
    )
    # Completions of one prompt are draws of their own.
    response = np.asarray(rollout.tokens[:, PROMPT_COLUMNS:]).reshape(-1, GROUP, NEW_TOKENS)
    for group in response:
        assert len(np.unique(group, axis=0)) == GROUP


def test_the_key_decides(params):
    first, again, other = (run(params, padded(), seed=seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first.tokens != other.tokens)


def test_greedy_is_the_argmax_of_the_full_forward_step_by_step(params):
    rollout = run(params, padded(), temperature=0.0)
    prompts, prompt_valid = padded()
    # The same rows from column 0 on, extended one argmax at a time.
    rows = np.zeros((len(prompts), PROMPT_COLUMNS + NEW_TOKENS), np.int32)
    for row, prompt, real in zip(rows, prompts, prompt_valid, strict=True):
        row[: real.sum()] = prompt[real]
    lengths = PROMPT_LENGTHS.copy()
    completions = []
    for _ in range(NEW_TOKENS):
        logits = apply(MODEL, params, jnp.asarray(rows), jnp.asarray(lengths), mtp_depth=0).logits
        chosen = np.argmax(np.asarray(logits)[np.arange(len(rows)), lengths - 1], axis=-1)
        rows[np.arange(len(rows)), lengths] = chosen
        lengths += 1
        completions.append(chosen)
    expected, mask = truncated(np.stack(completions, axis=1), EOS)
    np.testing.assert_array_equal(
        rollout.tokens[:, PROMPT_COLUMNS:], np.repeat(expected, GROUP, axis=0)
    )
    np.testing.assert_array_equal(rollout.response_mask, np.repeat(mask, GROUP, axis=0))


def test_padding_and_neighbours_do_not_matter(params):
    rollout = run(params, padded())
    wider = run(params, padded(columns=PROMPT_COLUMNS + 2))
    for name in ("response_mask", "log_probs"):
        close(getattr(wider, name), getattr(rollout, name))
    np.testing.assert_array_equal(wider.tokens[:, 2:], rollout.tokens)

    tokens, valid = padded()
    shorter = tokens.at[0, :3].set(PAD), valid.at[0, :3].set(False)
    others = run(params, shorter)
    assert np.any(rollout.log_probs[:GROUP] != others.log_probs[:GROUP])
    for a, b in zip(rollout[:-1], others[:-1], strict=True):
        np.testing.assert_array_equal(a[GROUP:], b[GROUP:])
    close(rollout.auxiliary_log_probs[:, GROUP:], others.auxiliary_log_probs[:, GROUP:])


def test_ending_early_changes_nothing(params):
    # One row a prompt; each comes to a token of its own that ends rows before the last round, so
    # that the loop stops short of it.
    few = dict(group_size=1, max_new_tokens=12, auxiliary=False)
    tokens, valid = padded()
    prompts = tokens[:2], valid[:2]
    endless = run(params, prompts, eos_ids=(NEVER,), **few)
    assert np.all(endless.response_mask)
    seen = [set(row) - {PAD} for row in np.asarray(endless.tokens[:, PROMPT_COLUMNS:-2]).tolist()]
    ends = min(seen[0] - seen[1]), min(seen[1] - seen[0])
    expected, mask = truncated(endless.tokens[:, PROMPT_COLUMNS:], *ends)
    early = run(params, prompts, eos_ids=ends, **few)
    np.testing.assert_array_equal(early.tokens[:, PROMPT_COLUMNS:], expected)
    np.testing.assert_array_equal(early.response_mask, mask)
    close(early.log_probs, np.where(mask, endless.log_probs, 0))


def test_tokens_follow_the_model(params):
    # 4096 pairs of tokens after one prompt.
    prompts, valid = padded(lengths=[4])
    draw = functools.partial(
        run,
        prompts=(prompts, valid),
        group_size=4096,
        max_new_tokens=2,
        temperature=0.7,
        eos_ids=(NEVER,),
        auxiliary=False,
    )
    logits = apply(MODEL, params, jnp.roll(prompts, -1, axis=1), jnp.array([4]), mtp_depth=0).logits
    logits = np.asarray(logits[0, 3], np.float64)

    def expected(temperature):
        weights = np.exp(logits / temperature)
        return 4096 * weights / weights.sum()

    def statistic(observed, expected):
        """Pearson's, the rare tokens taken together."""
        rare = expected < 10
        observed = [*observed[~rare], observed[rare].sum()]
        expected = np.array([*expected[~rare], max(expected[rare].sum(), 1.0)])
        return np.sum((observed - expected) ** 2 / expected)

    first = np.asarray(draw(params).tokens)[:, -2]
    observed = np.bincount(first, minlength=VOCABULARY)
    # 15 degrees of freedom at most: above 60 once in three million. A wrong temperature is seen.
    assert statistic(observed, expected(0.7)) < 60
    assert statistic(observed, expected(1.0)) > 200

    # With a head of zeros both tokens are uniform and independent; reusing a round's key would
    # make them equal. 255 degrees of freedom: mean 255, standard deviation 22.6.
    head = jax.tree.map(jnp.zeros_like, params["trunk"]["head"])
    uniform = {**params, "trunk": {**params["trunk"], "head": head}}
    pair = np.asarray(draw(uniform).tokens)[:, -2:]
    observed = np.bincount(pair @ [VOCABULARY, 1], minlength=VOCABULARY**2)
    assert statistic(observed, np.full(VOCABULARY**2, 16.0)) < 255 + 6 * 22.6


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_bfloat16_and_no_modules_trace(temperature):
    for config in (
        dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16"),
        dataclasses.replace(CONFIG, num_mtp_modules=0),
    ):
        model, auxiliary = Model(config), config.num_mtp_modules > 0
        rollout = jax.eval_shape(
            functools.partial(
                sample,
                model,
                group_size=GROUP,
                max_new_tokens=1,
                temperature=temperature,
                eos_ids=(EOS,),
                pad_id=PAD,
                auxiliary=auxiliary,
            ),
            jax.eval_shape(model.init, jax.random.key(0)),
            *padded(),
            jax.random.key(0),
        )
        assert rollout.tokens.shape == (ROWS, PROMPT_COLUMNS + 1)
        assert (rollout.tokens.dtype, rollout.valid.dtype) == (jnp.int32, bool)
        assert (rollout.log_probs.shape, rollout.log_probs.dtype) == ((ROWS, 1), jnp.float32)
        if auxiliary:
            assert rollout.auxiliary_log_probs.shape == (MODULES, ROWS, 1)
            assert rollout.auxiliary_log_probs.dtype == jnp.float32
        else:
            assert rollout.auxiliary_log_probs is None


def test_chunks_of_prompts_are_sampled_as_calls_of_their_own(params):
    prompts, valid = padded(lengths=np.array([5, 3, 1, 4]))
    options = {
        "group_size": 2,
        "max_new_tokens": NEW_TOKENS,
        "temperature": 1.0,
        "eos_ids": (EOS,),
        "pad_id": PAD,
        "auxiliary": True,
    }
    whole = jax.jit(functools.partial(sample_in_chunks, 2, MODEL, **options))
    found = whole(params, prompts, valid, jax.random.key(0))
    for chunk in range(2):
        key, two = jax.random.fold_in(jax.random.key(0), chunk), slice(2 * chunk, 2 * chunk + 2)
        alone = run(params, (prompts[two], valid[two]), key=key, group_size=2)
        four = slice(4 * chunk, 4 * chunk + 4)
        np.testing.assert_array_equal(found.tokens[four], alone.tokens)
        np.testing.assert_array_equal(found.valid[four], alone.valid)
        np.testing.assert_array_equal(found.response_mask[four], alone.response_mask)
        close(found.log_probs[four], alone.log_probs)
        close(found.auxiliary_log_probs[:, four], alone.auxiliary_log_probs)
    assert len(np.unique(found.tokens, axis=0)) > 4
