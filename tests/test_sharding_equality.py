"""Eight devices do what one does: every mesh, every regime and both kinds of model, in pairs.

`benchmarks/sharding_equality.py` goes through all combinations; docs/results/sharding.md has its
table.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from occ_jax.config import Config, MeshConfig, RolloutConfig
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import (
    abstract,
    make_mesh,
    on_mesh,
    replicated,
    row_sharding,
    state_shardings,
)
from occ_jax.programs import make_programs
from occ_jax.rollout import sampler
from tests.meshes import (
    MESHES,
    MODELS,
    REGIMES,
    B,
    P,
    R,
    deviations,
    make_batch,
    on_one_device,
    parameters,
    samples,
    two_updates,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Every mesh and every regime once, for both models.
PAIRS = [
    (model, mesh, [*REGIMES][(number + shift) % len(REGIMES)])
    for model, shift in (("dense", 0), ("moe", 3))
    for number, mesh in enumerate(MESHES[model])
]


def test_the_pairs_leave_nothing_out():
    for model in MODELS:
        assert {mesh for name, mesh, _ in PAIRS if name == model} == {*MESHES[model]}
        assert {regime for name, _, regime in PAIRS if name == model} == {*REGIMES}
    assert all(np.prod(mesh) == 8 for meshes in MESHES.values() for mesh in meshes if mesh[3] != 1)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "mesh", "regime"), PAIRS, ids=str)
def test_a_mesh_does_what_one_device_does(model, mesh, regime, record_property):
    one = on_one_device(model, regime)
    found = two_updates(model, regime, mesh)
    apart = deviations(found, one)
    lies = " × ".join(map(str, mesh))
    there = {name: any(x.size for x in jax.tree.leaves(getattr(one, name))) for name in apart}
    cells = (f"{x:.1e}" if there[name] else "–" for name, x in apart.items())
    record_property("figures", f"| {model} | {lies} | {regime} | {' | '.join(cells)} |")
    assert max(apart.values()) <= 1e-5, apart
    assert found.metrics.keys() == one.metrics.keys()
    for name, values in found.metrics.items():
        np.testing.assert_allclose(values, one.metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # That is of something: every parameter moved, and what the regime measures is there.
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), one.params, parameters(model))
    assert min(size for path, size in _named(moved) if "correction_bias" not in path) > 1e-4
    measured = {"occ/exact": 3, "occ/cross_batch": 3, "occ/log_prob": 3}.get(regime, 0)
    assert one.correlation.size == (4 if measured else 0)
    assert one.penalty.size == (6 if measured else 0)
    assert one.coefficient.size == (0 if regime == "detach" else 4)


def _named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


@pytest.mark.parametrize(
    ("model", "mesh", "gather_weights"),
    [
        ("dense", (2, 2, 2, 1), True),
        ("dense", (2, 2, 2, 1), False),
        ("moe", (1, 2, 2, 2), True),
        ("moe", (1, 2, 2, 2), False),
        ("moe", (2, 1, 1, 4), True),
    ],
    ids=str,
)
def test_rollouts_are_those_of_one_device(model, mesh, gather_weights):
    one = samples(model, (1, 1, 1, 1))
    found = samples(model, mesh, gather_weights=gather_weights)
    for actual, wanted in zip(found, one, strict=True):
        np.testing.assert_array_equal(actual.tokens, wanted.tokens)
        np.testing.assert_array_equal(actual.valid, wanted.valid)
        np.testing.assert_allclose(actual.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-6)
    scored = [rollouts[0].auxiliary_log_probs for rollouts in (found, one)]
    np.testing.assert_allclose(*scored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "mesh"), [("dense", (1, 4, 2, 1)), ("moe", (1, 2, 1, 4))], ids=str
)
def test_weights_are_gathered_once_a_rollout(model, mesh):
    devices = make_mesh(MeshConfig(*mesh))
    params = abstract(devices, jax.eval_shape(Model(MODELS[model]).init, jax.random.key(0)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        *(
            jax.ShapeDtypeStruct((16, P), x, sharding=row_sharding(devices))
            for x in (np.int32, np.bool)
        ),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(devices)),
    )

    def gathered(*, gather_weights):
        """Weights that are told where to lie: outside the decoding loop, and inside."""
        options = RolloutConfig(
            num_prompts=16, group_size=2, max_new_tokens=R, gather_weights=gather_weights
        )
        config = Config(model=MODELS[model], rollout=options, mesh=MeshConfig(*mesh))
        run = make_programs(config, devices, (1,), 0).sample
        # Read from the trace: compilers move what they can out of loops this small.
        loops = _told_where_to_lie(run.trace(params, *arguments).jaxpr)
        return loops.count(False), loops.count(True)

    outside, inside = gathered(gather_weights=True)
    assert outside > 5  # a block has that many kernels
    assert inside == 1  # the embedding, whose rows lie over tensor before and after
    assert gathered(gather_weights=False)[1] > 5


def _told_where_to_lie(jaxpr, inside=False):
    """Of every constrained matrix (activations have more dimensions): whether a loop does it."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "sharding_constraint" and equation.invars[0].aval.ndim == 2:
            found.append(inside)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += _told_where_to_lie(inner, inside or name == "while")
    return found


@pytest.mark.parametrize(
    ("model", "mesh"), [("dense", (2, 2, 2, 1)), ("moe", (1, 2, 2, 2))], ids=str
)
def test_no_device_holds_the_cache_of_others(model, mesh):
    """Of keys and values [repeats, rows, columns, heads, size] every array is of one device's."""
    # Sizes that no other array has.
    config = dataclasses.replace(MODELS[model], head_dim=6)
    devices, columns, group = make_mesh(MeshConfig(*mesh)), 23, 3

    def run(params, prompts, valid, key):
        return sampler.sample(
            Model(config),
            params,
            prompts,
            valid,
            key,
            group_size=group,
            max_new_tokens=columns - P,
            temperature=1.0,
            eos_ids=(1,),
            pad_id=0,
        )

    params = jax.eval_shape(Model(config).init, jax.random.key(0))
    shardings = state_shardings(devices, params)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    params = jax.tree.map(place, params, shardings)
    batch = make_batch()
    prompts = (place(x[:B, :P], row_sharding(devices)) for x in (batch.tokens, batch.valid))
    program = jax.jit(on_mesh(devices, run)).lower(params, *prompts, jax.random.key(0)).compile()
    shapes = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    }
    caches = {shape[-4:] for shape in shapes if len(shape) >= 4 and {23, 6} <= {*shape[-4:]}}
    held = B * group // (mesh[0] * mesh[1] * mesh[3])
    heads = config.num_kv_heads // mesh[2]
    assert (held, columns, heads, 6) in caches
    assert max(np.prod(shape) for shape in caches) == held * columns * heads * 6
