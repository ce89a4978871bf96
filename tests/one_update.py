"""One mini-batch, its gradients and statistics written out, and what tests of an update share.

The oracle is `Model.apply` on rows packed to the right, gathered by index and differentiated by one
`jax.grad` a loss; nothing of `occ_jax.rl` enters it. The optimizer of most tests has b1 = 0 and a
clip that is never reached, so that its first moment *is* the gradient the trunk was given.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from occ_jax.calibration import CalibrationState
from occ_jax.config import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    MTPConfig,
    OptimizerConfig,
    RolloutConfig,
)
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import state_shardings
from occ_jax.rl.train_step import init_state, train_step
from occ_jax.types import Batch

V, K, TEMPERATURE, P, R = 16, 2, 0.8, 4, 5
# Four prompts, two completions each. A prompt of one token leaves module 1 without a slot for the
# first response token and module 2 without one for the first two.
PROMPTS = np.array([4, 4, 1, 1, 3, 3, 2, 2])
RESPONSES = np.array([5, 2, 3, 1, 5, 4, 1, 3])
UNTRAINED = 5  # a row that was filtered: real tokens, none of them trained on
B, T = len(PROMPTS), P + R


def make_config(modules=K, micro_batches=1, tie=False, algorithm=(), optimizer=(), **mtp):
    """A config for a mini-batch of B rows; `mtp` overrides the calibration's fields."""
    return Config(
        model=ModelConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=16,
            vocab_size=V,
            tie_embeddings=tie,
            num_mtp_modules=modules,
        ),
        rollout=RolloutConfig(
            num_prompts=8, group_size=2, max_new_tokens=R, temperature=TEMPERATURE
        ),
        algorithm=AlgorithmConfig(
            updates_per_rollout=2, micro_batches=micro_batches, **dict(algorithm)
        ),
        mtp=MTPConfig(**{"regime": "occ", "estimator": "exact", "decay": 0.0} | mtp),
        optimizer=OptimizerConfig(
            **{"learning_rate": 0.1, "b1": 0.0, "eps": 1.0, "weight_decay": 0.01, "clip_norm": 1e6}
            | dict(optimizer)
        ),
    )


def copied(params, mesh):
    """On the mesh, as parameters are when a run starts; `place_state` takes their buffers over."""
    return jax.device_put(jax.tree.map(jnp.copy, params), state_shardings(mesh, params))


# --- the oracle -----------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the losses read besides parameters and tokens."""

    old: Any  # [B, R]
    old_auxiliary: Any  # [K, B, R]
    reference: Any  # [B, R]
    advantages: Any  # [B]
    auxiliary_advantages: Any  # [K, B]
    rows: Any  # [B], 1 = the row contributes to the sums; denominators are of all rows


class Oracle(NamedTuple):
    """Log-probabilities, losses and gradients at one set of parameters."""

    log_probs: Any  # [B, R]
    auxiliary_log_probs: Any  # [K, B, R]
    losses: Any  # by name: a number, or K of them
    agreement: Any  # [K], share of tokens
    g: Any  # of theta: L_RL, the policy loss alone
    entropy: Any  # of theta
    kl: Any  # of theta
    h_policy: Any  # of theta, K trees
    h_ce: Any  # of theta, K trees
    phi_ce: Any  # of phi: the sum over modules
    phi_distill: Any
    phi_policy: Any  # K trees


def masks(k):
    """[B, R]: trained tokens that head k (0: the main one) predicts from a real token."""
    column = np.arange(R)[None, :]
    trained = (column < RESPONSES[:, None]) & (np.arange(B) != UNTRAINED)[:, None]
    return trained & (PROMPTS[:, None] + column - k - 1 >= 0)


MASKS = np.stack([masks(k) for k in range(K + 1)])


@functools.cache
def model():
    return Model(make_config().model)


@functools.cache
def parameters(modules=K, tie=False):
    """Random parameters with norms that are not all ones; the trunk is the same for every K."""
    params = Model(make_config(modules, tie=tie, regime="detach").model).init(jax.random.key(3))
    scale = np.random.default_rng(1).uniform(0.5, 1.5, 16).astype(np.float32)
    return jax.tree.map(lambda x: jnp.asarray(x * scale) if x.ndim == 1 else x, params)


@functools.cache
def packed():
    """[B, T] real tokens, padded on the right by zeros, and their number."""
    tokens = np.random.default_rng(0).integers(1, V, (B, T))
    tokens[1::2, :P] = tokens[0::2, :P]  # completions of one prompt
    lengths = PROMPTS + RESPONSES
    return np.where(np.arange(T) < lengths[:, None], tokens, 0), lengths


def response_logits(params):
    """K + 1 arrays [B, R, V]: what each head says of each response token, garbage off MASKS."""
    tokens, lengths = packed()
    out = model().apply(params, jnp.asarray(tokens), jnp.asarray(lengths))
    rows, columns = np.arange(B)[:, None], PROMPTS[:, None] + np.arange(R)
    return [
        logits[rows, np.clip(columns - 1 - k, 0, logits.shape[1] - 1)] / TEMPERATURE
        for k, logits in enumerate([out.logits, *out.mtp_logits])
    ]


def response_tokens():
    columns = np.minimum(PROMPTS[:, None] + np.arange(R), T - 1)
    return np.take_along_axis(packed()[0], columns, axis=1)


def losses(params, inputs):
    """Every loss by name, each with the mean over its own trained tokens."""
    logits = [jax.nn.log_softmax(x) for x in response_logits(params)]
    log_probs = [
        jnp.take_along_axis(x, response_tokens()[..., None], axis=-1)[..., 0] for x in logits
    ]

    def mean(values, k):
        used = MASKS[k] & (inputs.rows[:, None] > 0)
        return jnp.sum(jnp.where(used, values, 0.0)) / MASKS[k].sum()

    def policy(k, old, advantages):
        ratio = jnp.exp(log_probs[k] - old)
        gain = advantages[:, None] * ratio
        return -mean(jnp.minimum(gain, advantages[:, None] * jnp.clip(ratio, 0.8, 1.28)), k)

    teacher = jnp.exp(jax.lax.stop_gradient(logits[0]))
    difference = inputs.reference - log_probs[0]
    result = {
        "rl": policy(0, inputs.old, inputs.advantages),
        "entropy": mean(-jnp.sum(jnp.exp(logits[0]) * logits[0], axis=-1), 0),
        "kl": mean(jnp.exp(difference) - difference - 1, 0),
        "policy": [
            policy(k, inputs.old_auxiliary[k - 1], inputs.auxiliary_advantages[k - 1])
            for k in range(1, K + 1)
        ],
        "ce": [-mean(log_probs[k], k) for k in range(1, K + 1)],
        "distill": [-mean(jnp.sum(teacher * logits[k], axis=-1), k) for k in range(1, K + 1)],
    }
    agreement = [mean(x.argmax(-1) == logits[0].argmax(-1), k) for k, x in enumerate(logits)]
    return result, (log_probs, jnp.stack(agreement[1:]))


@jax.jit
def oracle(params, inputs):
    """Everything above by one independent `jax.grad` a loss."""

    def gradient(group, name, k=None):
        def value(part):
            value = losses(params | {group: part}, inputs)[0][name]
            if k is not None:
                return value[k]
            return sum(value) if isinstance(value, list) else value

        return jax.grad(value)(params[group])

    values, (log_probs, agreement) = losses(params, inputs)
    return Oracle(
        log_probs=log_probs[0],
        auxiliary_log_probs=jnp.stack(log_probs[1:]),
        losses=jax.tree.map(jnp.asarray, values),
        agreement=agreement,
        g=gradient("trunk", "rl"),
        entropy=gradient("trunk", "entropy"),
        kl=gradient("trunk", "kl"),
        h_policy=[gradient("trunk", "policy", k) for k in range(K)],
        h_ce=[gradient("trunk", "ce", k) for k in range(K)],
        phi_ce=gradient("mtp", "ce"),
        phi_distill=gradient("mtp", "distill"),
        phi_policy=[gradient("mtp", "policy", k) for k in range(K)],
    )


# --- the batch ------------------------------------------------------------------------------------


@functools.cache
def inputs():
    """Random advantages, old log-probabilities close enough to the current ones for r ~ 1."""
    random = np.random.default_rng(10)
    zeros = np.zeros((K, B, R), np.float32)
    advantages = random.normal(size=B).astype(np.float32)
    empty = Inputs(
        old=zeros[0],
        old_auxiliary=zeros,
        reference=zeros[0],
        advantages=advantages,
        auxiliary_advantages=np.stack([advantages] * K),
        rows=np.ones(B, np.float32),
    )
    now = oracle(parameters(), empty)
    return empty._replace(
        old=np.asarray(now.log_probs + random.normal(0, 0.3, (B, R)), np.float32),
        old_auxiliary=np.asarray(
            now.auxiliary_log_probs + random.normal(0, 0.3, (K, B, R)), np.float32
        ),
        reference=np.asarray(now.log_probs + random.normal(0, 0.5, (B, R)), np.float32),
    )


@functools.cache
def expected():
    """The oracle at the first update."""
    return oracle(parameters(), inputs())


def make_batch(modules=K, reference=False, padding=1.5, pad_token=0, **replaced):
    """The same rows padded on both sides, with `padding` in the arrays wherever it is padded."""
    tokens, lengths = packed()
    source = np.arange(T)[None, :] - (P - PROMPTS)[:, None]
    valid = (source >= 0) & (source < lengths[:, None])
    padded = np.take_along_axis(tokens, np.clip(source, 0, T - 1), axis=1)
    data = inputs()
    old = np.where(MASKS[0], data.old, padding).astype(np.float32)
    old_auxiliary = np.where(MASKS[1:], data.old_auxiliary, padding).astype(np.float32)
    batch = Batch(
        tokens=jnp.asarray(np.where(valid, padded, pad_token), jnp.int32),
        valid=jnp.asarray(valid),
        response_mask=jnp.asarray(MASKS[0]),
        old_log_probs=jnp.asarray(old),
        old_auxiliary_log_probs=jnp.asarray(old_auxiliary[:modules]) if modules else None,
        reference_log_probs=(
            jnp.asarray(np.where(MASKS[0], data.reference, padding).astype(np.float32))
            if reference
            else None
        ),
        weights=None,
        advantages=jnp.asarray(data.advantages),
    )
    return batch._replace(**replaced)


# --- helpers --------------------------------------------------------------------------------------


def start(config, params=None):
    modules, tie = config.model.num_mtp_modules, config.model.tie_embeddings
    return init_state(config, parameters(modules, tie) if params is None else params, 0)


def update(config, batch, state=None, measure=True):
    """One eager update."""
    state = start(config) if state is None else state
    return train_step(Model(config.model), config, state, batch, measure=measure)


def jit_update(config, batch, state=None, measure=True):
    """One compiled update."""
    state = start(config) if state is None else state
    step = functools.partial(train_step, Model(config.model), config, measure=measure)
    return jax.jit(step)(state, batch)


def with_coefficient(state, values):
    """The state with another lambda in it."""
    opt_state = optax.tree_utils.tree_set(
        state.opt_state, coefficient=jnp.asarray(values, jnp.float32)
    )
    return state._replace(opt_state=opt_state)


def coefficient(state):
    return optax.tree_utils.tree_get(state.opt_state["trunk"], "coefficient")


def calibration(state):
    (found,) = (x for x in state.opt_state["trunk"] if isinstance(x, CalibrationState))
    return found


def emitted(state, group="trunk"):
    """The gradient the optimizer was given: its first moment, as b1 = 0 and nothing clips."""
    return optax.tree_utils.tree_get(state.opt_state[group], "mu")


def combine(g, h, weights):
    return jax.tree.map(
        lambda x, *y: x + sum(w * z for w, z in zip(weights, y, strict=True)), g, *h
    )


def flat(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def inner(a, b):
    return float(flat(a) @ flat(b))


def norm(tree):
    return float(np.linalg.norm(flat(tree)))


def assert_close(actual, wanted, rtol=1e-5):
    """Equal up to float32's rounding of the whole: rtol is of the largest entry."""
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    actual, wanted = flat(actual), flat(wanted)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=rtol * np.abs(wanted).max(initial=0))


def assert_same_bits(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
