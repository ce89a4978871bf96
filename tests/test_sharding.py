"""Eight devices do what one does, and every array lies where the table says."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

from occ_jax.cli.config_file import load_config
from occ_jax.config import (
    AlgorithmConfig,
    Config,
    DeltaNetConfig,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MTPConfig,
    OptimizerConfig,
    RolloutConfig,
)
from occ_jax.errors import UserError
from occ_jax.models.huggingface import read_config
from occ_jax.models.model import Model
from occ_jax.models.responses import score_tokens
from occ_jax.parallel import sharding
from occ_jax.parallel.sharding import (
    abstract,
    make_mesh,
    on_mesh,
    replicated,
    row_sharding,
    state_shardings,
)
from occ_jax.planning.hlo import collective_bytes
from occ_jax.programs import make_programs
from occ_jax.rl import gradients
from occ_jax.rl.train_step import abstract_state, place_state
from occ_jax.types import Batch
from tests.checkpoint_files import GOLDEN
from tests.one_update import copied

CONFIGS = Path(__file__).parent.parent / "configs"

B, P, R, V = 8, 4, 5, 16
STORED = ("fsdp", "expert")


pytestmark = pytest.mark.usefixtures("quick_compilation")

DENSE = ModelConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=16,
    vocab_size=V,
)
# Every other part, scanned, rematerialised and scored in pieces.
MIXED = dataclasses.replace(
    DENSE,
    num_layers=4,
    # A random delta net puts out next to nothing; its norm would magnify the last bits of that.
    rms_norm_eps=1e-2,
    delta_net=DeltaNetConfig(
        num_key_heads=2,
        num_value_heads=2,
        key_head_dim=4,
        value_head_dim=4,
        full_attention_interval=2,
        chunk_size=4,
    ),
    latent_attention=LatentAttentionConfig(
        query_rank=8, kv_rank=8, nope_head_dim=4, rope_head_dim=4, value_head_dim=4
    ),
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, intermediate_size=8, shared_intermediate_size=8
    ),
    scan_layers=True,
    remat="full",
    logits_columns=2,
)


def make_config(mesh=(), micro_batches=1, modules=1, model=DENSE, **mtp):
    return Config(
        model=dataclasses.replace(model, num_mtp_modules=modules),
        rollout=RolloutConfig(num_prompts=8, group_size=2, max_new_tokens=R),
        algorithm=AlgorithmConfig(updates_per_rollout=2, micro_batches=micro_batches),
        mtp=MTPConfig(**mtp),
        # An eps far above the gradient's rounding: Adam would turn a zero's sign into a whole step.
        optimizer=OptimizerConfig(learning_rate=0.1, eps=0.1, clip_norm=0.5),
        mesh=MeshConfig(*mesh),
    )


@functools.cache
def parameters(model=DENSE):
    return Model(model).init(jax.random.key(0))


@functools.cache
def make_batch():
    """Left-padded prompts of 2 to 4 tokens, responses of 1 to 5."""
    random = np.random.default_rng(0)
    column = np.arange(P + R)[None, :]
    prompts, responses = random.integers(2, P + 1, (B, 1)), random.integers(1, R + 1, (B, 1))
    valid = (column >= P - prompts) & (column < P + responses)
    old = random.normal(-2.5, 0.2, (2, B, R)).astype(np.float32)
    return Batch(
        tokens=jnp.asarray(random.integers(0, V, (B, P + R)), jnp.int32),
        valid=jnp.asarray(valid),
        response_mask=jnp.asarray(valid[:, P:]),
        old_log_probs=jnp.asarray(old[0]),
        old_auxiliary_log_probs=jnp.asarray(old[1:]),
        reference_log_probs=None,
        weights=None,
        advantages=jnp.asarray(random.normal(size=B), jnp.float32),
    )


def two_updates(config):
    """Two updates, as the coefficient of some estimators is 0 in the first."""
    mesh = make_mesh(config.mesh)
    step = make_programs(config, mesh, (1,), 0).update
    state, history = place_state(config, copied(parameters(config.model), mesh), 0, mesh), []
    for _ in range(2):
        state, metrics = step(state, make_batch())
        history.append(metrics)
    assert step._cache_size() == 1
    return state, history, state_shardings(mesh, state)


def assert_close(actual, wanted, rtol):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(np.asarray(y)).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale)


def test_a_mesh_does_what_one_device_does_with_every_part():
    mtp = {"regime": "occ", "estimator": "exact"}
    state, history, shardings = two_updates(make_config((1, 2, 2, 2), model=MIXED, **mtp))
    one, one_history, _ = two_updates(make_config(model=MIXED, **mtp))
    for metrics, wanted in zip(history, one_history, strict=True):
        assert metrics.keys() == wanted.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert "moe/max_violation_mean" in history[0]
    assert_close(state.params, one.params, rtol=3e-5)

    # After two updates everything still lies where the table puts it.
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    theta = state.params["trunk"]
    moments = optax.tree_utils.tree_get(state.opt_state["trunk"], "nu")
    for tree in (theta, moments):
        attention = tree["layers"][0][1]
        held = {
            "query": attention["mixer"]["query"]["kernel"],  # [2, 8, 16]
            "gate": attention["feed_forward"]["experts"]["gate"],  # [2, 4, 16, 8]
            "down": attention["feed_forward"]["experts"]["down"],  # [2, 4, 8, 16]
            "embedding": tree["embed"]["embedding"],  # [16, 16]
            "norm": tree["final_norm"]["scale"],  # [16]
        }
        assert {name: leaf.addressable_shards[0].data.shape for name, leaf in held.items()} == {
            "query": (2, 2, 8),
            "gate": (2, 2, 8, 4),
            "down": (2, 2, 4, 8),
            "embedding": (8, 4),
            "norm": (16,),
        }


def test_every_micro_batch_is_spread_over_all_devices(monkeypatch):
    # In [M, B/M] the rows of one device are those of one micro-batch, unless they are dealt again.
    seen, forward = [], gradients.trunk_states

    def inspected(*arguments):
        states = forward(*arguments)
        shape = states.hidden.shape
        jax.debug.inspect_array_sharding(
            states.hidden, callback=lambda x: seen.append(x.shard_shape(shape))
        )
        return states

    monkeypatch.setattr(gradients, "trunk_states", inspected)
    config = make_config((4, 1, 2), 2, modules=0, regime="detach")
    mesh = make_mesh(config.mesh)
    step = make_programs(config, mesh, (1,), 0).update
    state = place_state(config, {"trunk": copied(parameters()["trunk"], mesh), "mtp": {}}, 0, mesh)
    step.lower(state, make_batch()._replace(old_auxiliary_log_probs=None)).compile()
    assert seen == [(1, P + R - 1, 16)]


def test_the_abstract_state_is_the_placed_one_without_its_arrays():
    config = make_config((2, 2, 2))
    mesh = make_mesh(config.mesh)
    state = place_state(config, copied(parameters(), mesh), 0, mesh)
    abstract = abstract_state(Model(config.model), config, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert shape.sharding == leaf.sharding


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("embed", "embedding"), (16, 32), Spec("tensor", STORED)),
        (("head", "kernel"), (32, 16), Spec(STORED, "tensor")),
        (("layers", 0, 0, "mixer", "key", "kernel"), (32, 16), Spec(STORED, "tensor")),
        (("layers", 0, 0, "mixer", "key", "bias"), (16,), Spec("tensor")),
        (("layers", 0, 0, "mixer", "output", "kernel"), (16, 32), Spec("tensor", STORED)),
        (("layers", 0, 0, "feed_forward", "gate", "kernel"), (32, 64), Spec(STORED, "tensor")),
        (("layers", 0, 0, "feed_forward", "down", "kernel"), (64, 32), Spec("tensor", STORED)),
        ((0, "projection", "kernel"), (64, 32), Spec("tensor", STORED)),
        (("final_norm", "scale"), (32,), Spec()),
        # In front of a kernel: repeats of a scanned segment.
        (("mixer", "query", "kernel"), (3, 32, 16), Spec(None, STORED, "tensor")),
        # Experts take the expert axis, and what they leave is for the other dimensions.
        (("experts", "gate"), (4, 32, 16), Spec("expert", "fsdp", "tensor")),
        (("experts", "down"), (3, 4, 16, 32), Spec(None, "expert", "tensor", "fsdp")),
        (("mixer", "query", "bias"), (3, 16), Spec(None, "tensor")),
        (("coefficient",), (2,), Spec()),
        # A dimension that the mesh does not divide is replicated, the other one is not.
        (("embed", "embedding"), (15, 32), Spec(None, STORED)),
        (("embed", "embedding"), (16, 30), Spec("tensor", "fsdp")),
        (("experts", "gate"), (3, 32, 16), Spec(None, STORED, "tensor")),
        (("head", "kernel"), (31, 16), Spec(None, "tensor")),
        (("layers", 0, 0, "mixer", "key", "bias"), (15,), Spec(None)),
    ],
)
def test_the_table_of_shardings(path, shape, spec):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2, expert=2))
    (placed,) = jax.tree.leaves(state_shardings(mesh, named_like(path, shape)))
    assert placed.mesh == mesh and placed.spec == spec


def named_like(path, shape):
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for name in reversed(path):
        tree = {name: tree}
    return tree


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        (("layers", 0, "mixer", "other", "kernel"), (4, 4)),
        (("layers", 0, "mixer", "other_norm", "scale"), (4,)),
        (("other_count",), ()),
        # A parameter's name with fewer dimensions than the parameter has.
        (("layers", 0, "mixer", "query", "kernel"), (4,)),
    ],
)
def test_a_parameter_that_the_table_does_not_name_is_an_error(path, shape):
    state = {"trunk": parameters()["trunk"], "extra": named_like(path, shape)}
    name = "/".join(map(str, ("extra", *path)))
    with pytest.raises(ValueError, match=re.escape(f"{name} of shape {shape} is not in the")):
        state_shardings(make_mesh(MeshConfig()), state)


def every_config():
    """The recipes, every family's published form, and a gate with biases, which no family has."""
    recipes = (load_config(str(path)).model for path in CONFIGS.glob("*.py"))
    families = (read_config(path.with_suffix("")) for path in GOLDEN.glob("*.npz"))
    gated = dataclasses.replace(DENSE, attention_gate=True, qkv_bias=True, num_mtp_modules=1)
    return [*recipes, *families, gated]


def test_the_table_names_all_parameters_there_are_and_no_others():
    used = set()
    for config in every_config():
        shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            used.add((path[-2].key, path[-1].key))
            assert len(sharding._PARAMETERS[path[-2].key, path[-1].key]) <= leaf.ndim
    assert used == sharding._PARAMETERS.keys()


@pytest.mark.parametrize("regime", ["detach", "ce", "occ"])
def test_the_table_names_all_of_an_optimizers_state(regime):
    """Moments are where their parameter is; everything else is a field that is declared."""
    config = make_config((1, 4, 2), regime=regime)
    state = abstract_state(Model(config.model), config, make_mesh(config.mesh))
    placed = jax.tree.map(lambda x: x.sharding, state)
    adam = [x for x in jax.tree.leaves(placed.opt_state, is_leaf=is_adam) if is_adam(x)]
    assert (
        [x.mu for x in adam]
        == [x.nu for x in adam]
        == [placed.params[part] for part in ("mtp", "trunk")]
    )
    others = jax.tree.leaves_with_path(state._replace(params=None))
    others = {path[-1].name for path, _ in others if hasattr(path[-1], "name")}
    wanted = {"step", "key", "count"} | (set() if regime == "detach" else {"coefficient"})
    assert others == wanted | ({"correlation", "penalty"} if regime == "occ" else set())
    assert others <= sharding._STATE_FIELDS


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize("axis", ["data", "expert"])
def test_rows_lie_over_every_axis_but_tensor(axis):
    mesh = make_mesh(MeshConfig(**{axis: 2}, fsdp=2, tensor=2))
    assert row_sharding(mesh).shard_shape((8, 5)) == (2, 5)
    assert row_sharding(mesh, 1).shard_shape((3, 8, 5)) == (3, 2, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)


def test_a_mesh_may_be_smaller_than_the_machine():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    assert mesh.shape == {"data": 1, "fsdp": 2, "tensor": 2, "expert": 1}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_a_mesh_with_too_few_devices_is_one_clear_line():
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(data=4, fsdp=2, tensor=2))
    assert str(error.value) == (
        "the mesh (data=4, fsdp=2, tensor=2, expert=1) needs 16 devices; this process sees 8"
    )


MOE = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=8, shared_intermediate_size=0)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (
            {"tensor": 4},
            {},
            "mesh.tensor is 4; it must be one of 1, 2, the divisors of model.num_heads 2, "
            "model.vocab_size 16, model.intermediate_size 16, model.num_kv_heads 2",
        ),
        (
            {"tensor": 16},
            {"num_heads": 16, "num_kv_heads": 16, "moe": MOE},
            "mesh.tensor is 16; it must be one of 1, 2, 4, 8, the divisors of model.num_heads 16, "
            "model.vocab_size 16, model.moe.intermediate_size 8, "
            "model.moe.shared_intermediate_size 0, model.num_kv_heads 16",
        ),
        (
            {"fsdp": 8, "expert": 4},
            {"moe": MOE},
            "mesh.fsdp is 8; it must be such that mesh.fsdp x mesh.expert (32) divides "
            "model.hidden_size (16)",
        ),
        (
            {"fsdp": 16},
            {"latent_attention": LatentAttentionConfig(query_rank=32, kv_rank=8)},
            "mesh.fsdp is 16; it must be such that mesh.fsdp x mesh.expert (16) divides "
            "model.latent_attention.kv_rank (8)",
        ),
        (
            {"expert": 2},
            {},
            "mesh.expert is 2; it must be 1 for a model without experts (model.moe)",
        ),
        (
            {"expert": 8},
            {"moe": MOE},
            "mesh.expert is 8; it must be a divisor of model.moe.num_experts (4)",
        ),
        (
            {"data": 2, "fsdp": 4, "expert": 4},
            {"moe": MOE},
            "rollout.num_prompts is 8; it must be such that prompts, and the 8 rows of a "
            "micro-batch, divide over the 32 shards of mesh.data, mesh.fsdp and mesh.expert",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_one_clear_line(mesh, changes, message):
    config = make_config(model=dataclasses.replace(DENSE, **changes), regime="detach")
    with pytest.raises(UserError) as error:
        enough = dataclasses.replace(config.rollout, num_prompts=64 if "data" not in mesh else 8)
        dataclasses.replace(config, rollout=enough, mesh=MeshConfig(**mesh))
    assert str(error.value) == message


def test_a_head_read_in_pieces_travels_as_often_as_one_read_at_once():
    """Weights there and gradients back, whatever the number of pieces that read them."""
    mesh, batch = make_mesh(MeshConfig(fsdp=4, tensor=2)), make_batch()
    hidden = jax.ShapeDtypeStruct((B, R, 16), jnp.float32, sharding=row_sharding(mesh))

    def sent(columns):
        model = Model(dataclasses.replace(DENSE, logits_columns=columns))

        def loss(theta, hidden):
            return jnp.sum(score_tokens(model, theta, hidden, batch.tokens[:, P:]).log_probs)

        shapes = abstract(mesh, jax.eval_shape(model.init, jax.random.key(0))["trunk"])
        gradient = jax.jit(on_mesh(mesh, jax.grad(loss, argnums=(0, 1))))
        return collective_bytes(gradient.lower(shapes, hidden).compile().as_text())

    once, pieces = (sum(sent(columns).values()) for columns in (0, 1))
    assert 0 < pieces <= 1.1 * once


def test_parameters_are_drawn_where_they_lie():
    """No device draws, or holds on the way, more than a few times its own part of the whole."""
    model = Model(dataclasses.replace(DENSE, hidden_size=64, intermediate_size=512, vocab_size=512))
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    init = jax.jit(model.init, out_shardings=state_shardings(mesh, shapes))
    memory = init.lower(jax.random.key(0)).compile().memory_analysis()
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < whole / 4


def test_gathered_weights_are_not_kept_for_the_backward_pass():
    """Not even where all else is: of three scanned layers no device has the matrices at once."""
    config = dataclasses.replace(DENSE, num_layers=3, scan_layers=True, intermediate_size=24)
    model, mesh = Model(config), make_mesh(MeshConfig(fsdp=8))
    shapes = abstract(mesh, jax.eval_shape(model.init, jax.random.key(0))["trunk"])
    batch = make_batch()

    def loss(theta):
        states = gradients.trunk_states(model, theta, batch.tokens, batch.valid)
        return jnp.sum(jnp.sin(states.hidden))

    program = jax.jit(on_mesh(mesh, jax.grad(loss))).lower(shapes).compile().as_text()
    assert "f32[3,2,24]" in program
    assert "f32[16,24]" in program
    assert "f32[3,16,24]" not in program
