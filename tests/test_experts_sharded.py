"""Experts on several devices: the layer of one device, and no device with all of the experts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from occ_jax.config import MeshConfig, ModelConfig, MoEConfig
from occ_jax.models import moe
from occ_jax.models.moe import Experts, MoE, Routing, dispatch
from occ_jax.parallel.sharding import make_mesh, on_mesh, row_sharding, state_shardings

B, T, E, D, F, k = 8, 6, 4, 16, 32, 2
CONFIG = ModelConfig(
    hidden_size=D,
    moe=MoEConfig(
        num_experts=E, experts_per_token=k, intermediate_size=F, shared_intermediate_size=F
    ),
)


@functools.cache
def layer():
    layer = MoE(CONFIG, nnx.Rngs(params=0))
    bias = jax.random.normal(jax.random.key(1), (E,))
    layer.router.correction_bias[...] = bias
    return nnx.graphdef(layer), {"feed_forward": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}


def run(params, x):
    """A number that every output has a part in, the outputs, and where tokens went."""
    out, chosen = nnx.merge(layer()[0], params["feed_forward"])(x)
    return jnp.sum(jnp.sin(3.0 * out)), (out, chosen)


def tokens(rows=B, columns=T):
    return jax.random.normal(jax.random.key(2), (rows, columns, D))


def value_and_gradients(mesh, x):
    both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    mesh = make_mesh(MeshConfig(**mesh))
    params = jax.device_put(layer()[1], state_shardings(mesh, layer()[1]))
    if len(x) % mesh.size == 0:
        x = jax.device_put(x, row_sharding(mesh))
    return jax.jit(on_mesh(mesh, both))(params, x)


@functools.cache
def on_one_device(rows=B, columns=T):
    return value_and_gradients({}, tokens(rows, columns))


def assert_same(actual, wanted):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        scale = max(float(np.abs(y).max()), 1e-30)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale)


MESHES = [
    {"data": 8},
    {"expert": 4},
    {"expert": 2, "data": 4},
    {"expert": 4, "fsdp": 2},
    {"expert": 2, "tensor": 4},
    {"expert": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_layer_is_that_of_one_device(mesh):
    assert_same(value_and_gradients(mesh, tokens()), on_one_device())


@pytest.mark.parametrize("mesh", [{}, {"data": 4}, {"expert": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_tokens_a_few_at_a_time_are_all_tokens(mesh, monkeypatch):
    # 12 tokens a device in pieces of 5 together: not a divisor.
    monkeypatch.setattr(moe, "_TOKENS_AT_ONCE", 5)
    assert_same(value_and_gradients(mesh, tokens()), on_one_device())


def test_rows_that_do_not_divide_over_the_mesh():
    mesh = {"expert": 2, "fsdp": 2, "tensor": 2}
    assert_same(value_and_gradients(mesh, tokens(1, 7)), on_one_device(1, 7))


def test_every_token_to_one_place():
    """Nothing is dropped however uneven the load is: one place has all the tokens to itself."""
    _, params = layer()
    uneven = jax.tree.map(jnp.copy, params)
    uneven["feed_forward"]["router"]["correction_bias"] = jnp.array([0.0, 0.0, 9.0, 9.0])
    mesh = make_mesh(MeshConfig(expert=2, data=4))
    spread = jax.device_put(uneven, state_shardings(mesh, uneven))
    _, (out, chosen) = jax.jit(on_mesh(mesh, run))(
        spread, jax.device_put(tokens(), row_sharding(mesh))
    )
    _, (wanted, _) = run(uneven, tokens())
    assert set(np.unique(chosen)) == {2, 3}
    assert_same(out, wanted)


def test_what_the_grouped_product_leaves_undefined_reaches_nothing(monkeypatch):
    """Rows beyond the groups, forward and backward, may hold anything: here NaN."""
    monkeypatch.setattr(jax.lax, "ragged_dot", _careless(jax.lax.ragged_dot))
    experts = Experts(CONFIG, CONFIG.moe, nnx.Rngs(params=0))
    graph, weights = nnx.graphdef(experts), nnx.to_pure_dict(nnx.state(experts, nnx.Param))
    x = tokens().reshape(-1, D)
    routing = Routing(
        jnp.tile(jnp.array([[1, 5], [6, 2]]), (len(x) // 2, 1)), jnp.ones((len(x), 2))
    )

    def loss(weights, x, weighted):
        out = dispatch(nnx.merge(graph, weights), x, routing._replace(weights=weighted))
        return jnp.sum(jnp.sin(out))

    found = jax.value_and_grad(loss, argnums=(0, 1, 2))(weights, x, routing.weights)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool(np.isfinite(x).all()), found)))
    assert np.abs(found[1][1]).max() > 0


def _careless(ragged_dot):
    """A ragged_dot that fills what it does not owe with NaN."""

    def spoil(x, sizes):
        return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes))[:, None], x, jnp.nan)

    @jax.custom_vjp
    def product(x, weights, sizes):
        return spoil(ragged_dot(x, weights, sizes), sizes)

    def forward(x, weights, sizes):
        return product(x, weights, sizes), (x, weights, sizes)

    def backward(kept, cotangent):
        x, weights, sizes = kept
        owed = (jnp.arange(len(x)) < jnp.sum(sizes))[:, None]
        x, cotangent = jnp.where(owed, x, 0), jnp.where(owed, cotangent, 0)
        _, pull = jax.vjp(lambda x, w: ragged_dot(x, w, sizes), x, weights)
        d_x, d_weights = pull(cotangent)
        return spoil(d_x, sizes), d_weights, None

    product.defvjp(forward, backward)
    return product


@functools.cache
def compiled(argnums=(0, 1), **mesh):
    both = jax.value_and_grad(run, argnums=argnums, has_aux=True)
    mesh = make_mesh(MeshConfig(**mesh))
    params = jax.device_put(layer()[1], state_shardings(mesh, layer()[1]))
    x = jax.device_put(tokens(), row_sharding(mesh))
    return jax.jit(on_mesh(mesh, both)).lower(params, x).compile()


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_no_device_holds_all_experts(mesh):
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled(**mesh).as_text())
    shapes = {tuple(map(int, shape.split(","))) for shape in shapes}
    width = F // mesh.get("tensor", 1)
    assert (E // mesh["expert"], D, width) in shapes
    assert not {(E, D, width), (E, width, D), (E, D, F), (E, F, D)} & shapes


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_device_does_its_share_of_the_work(mesh, record_property):
    # On CPUs the grouped product is one of all rows with every expert that is there. The gradient
    # of the matrices is a loop, which XLA counts once: tests/test_grouped.py counts its visits.
    share = compiled(1).cost_analysis()["flops"] / np.prod([*mesh.values()])
    own = compiled(1, **mesh).cost_analysis()["flops"]
    record_property("figures", f"experts on {mesh}: {own / share:.2f} times a device's share")
    assert own < 1.15 * share
