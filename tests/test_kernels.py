"""Every way to attend gives what the plain operations give, gradients and all, sharded too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ_jax.config import LatentAttentionConfig, MeshConfig, ModelConfig
from occ_jax.errors import UserError
from occ_jax.models import Model
from occ_jax.models.attention import BY_HEAD, Columns, attend
from occ_jax.models.kernels import (
    attend_by_lengths,
    attend_by_splash,
    attend_in_pieces,
    choose_kernel,
)
from occ_jax.parallel.sharding import make_mesh, on_mesh, row_sharding

ROWS, COLUMNS, HEADS, KV_HEADS, WIDTH = 4, 13, 4, 2, 8
SCALE = 0.3
PLAIN = ModelConfig(attention_kernel="plain")

PATHS = {
    "pieces": functools.partial(attend_in_pieces, scale=SCALE, size=5),
    "lengths": functools.partial(attend_by_lengths, scale=SCALE, implementation="xla"),
    "splash": functools.partial(attend_by_splash, scale=SCALE, names=BY_HEAD),
}


@functools.cache
def arrays():
    random = np.random.default_rng(0)
    shapes = [(ROWS, COLUMNS, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    parts = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    # Padded on both sides, on the left, on the right, not at all.
    first, last = np.array([[3], [5], [0], [0]]), np.array([[9], [13], [6], [13]])
    column = np.arange(COLUMNS)[None, :]
    return (*parts, jnp.asarray((first <= column) & (column < last)))


def plain(query, key, value, valid):
    columns = Columns(jnp.zeros(valid.shape, jnp.int32), valid, 0)
    return attend(PLAIN, query, key, value, columns, SCALE)


def result_and_gradients(path, mesh=None):
    """Of real columns; cotangents of the others are zero, as a loss makes them."""
    query, key, value, valid = arrays()
    if mesh is not None:
        path = on_mesh(mesh, path)
        query, key, value = jax.device_put((query, key, value), row_sharding(mesh))
    real = valid[:, :, None, None]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=query.shape), jnp.float32)

    def loss(*parts):
        out = jnp.where(real, path(*parts, valid), 0.0)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(
        query, key, value
    )
    return [out, *gradients]


@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_the_plain_one(name):
    for found, wanted in zip(
        result_and_gradients(PATHS[name]), result_and_gradients(plain), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        assert np.isfinite(found).all()
        assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("name", ["pieces", "splash"])
def test_every_path_is_the_plain_one_on_a_mesh(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = result_and_gradients(PATHS[name], mesh)
    for found, wanted in zip(spread, result_and_gradients(plain), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_works_on_the_rows_and_heads_of_its_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    traced = jax.jit(on_mesh(mesh, PATHS["splash"])).trace(*arrays())
    (shard_map,) = [e for e in traced.jaxpr.eqns if e.primitive.name == "shard_map"]
    shapes = [x.aval.shape for x in shard_map.params["jaxpr"].invars][-4:]  # first come masks
    # One row of each device, half the heads; columns and widths are padded to what a TPU takes.
    query, keys = (1, 128, HEADS // 2, 128), (1, 128, KV_HEADS // 2, 128)
    assert shapes == [query, keys, keys, (1, 128)]


def test_splash_works_on_more_columns_than_a_block():
    random = np.random.default_rng(0)
    shape = (1, 700, 1, 8)
    query, key, value = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(3))
    valid = jnp.arange(700)[None, :] >= 90
    found = jax.jit(PATHS["splash"])(query, key, value, valid)
    wanted = plain(query, key, value, valid)
    np.testing.assert_allclose(found[:, 90:], wanted[:, 90:], rtol=1e-5, atol=1e-5)


def largest_array(config, columns):
    """Elements of the largest intermediate result in the gradient of a whole model."""
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, columns), jnp.int32)

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(columns), (1, columns))
        return jnp.sum(model.trunk(params["trunk"], tokens, positions, tokens >= 0).hidden)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(jax.grad(loss))(params, tokens).jaxpr))


@pytest.mark.parametrize("how", [{"attention_kernel": "splash"}, {"attention_columns": 32}])
def test_no_array_grows_with_the_square_of_the_columns(how):
    config = ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2, remat="full", **how)
    columns = 4096
    assert largest_array(ModelConfig(num_layers=1, num_heads=2, num_kv_heads=2), columns) >= (
        2 * columns**2
    )
    assert largest_array(config, columns) <= columns * 300
    assert largest_array(config, 2 * columns) <= 2 * largest_array(config, columns)


@pytest.mark.parametrize("latent", [None, LatentAttentionConfig(8, 8, 4, 4, 6)])
@pytest.mark.parametrize("how", [{"attention_kernel": "splash"}, {"attention_columns": 3}])
def test_a_model_is_the_same_whatever_attends(latent, how):
    config = ModelConfig(num_layers=1, num_kv_heads=2, latent_attention=latent)
    params = Model(config).init(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 8)), jnp.int32)
    lengths = jnp.array([8, 5])
    wanted = Model(config).apply(params, tokens, lengths)
    found = Model(dataclasses.replace(config, **how)).apply(params, tokens, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            found.logits[row, :length], wanted.logits[row, :length], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "wanted"),
    [
        ("tpu", jnp.float32, 64, "splash"),
        ("cuda", jnp.bfloat16, 128, "cudnn"),
        ("cuda", jnp.float32, 128, "plain"),
        ("cuda", jnp.bfloat16, 192, "plain"),
        ("cpu", jnp.bfloat16, 128, "plain"),
    ],
)
def test_auto_goes_by_the_platform(monkeypatch, platform, dtype, width, wanted):
    monkeypatch.setattr("occ_jax.models.kernels._platform", lambda: platform)
    assert choose_kernel("auto", jnp.dtype(dtype), width) == wanted
    assert choose_kernel("plain", jnp.dtype(dtype), width) == "plain"


def test_a_kernel_that_cannot_work_is_refused():
    with pytest.raises(UserError, match=r"^model\.attention_kernel is 'cudnn'; it must be auto,"):
        ModelConfig(attention_kernel="cudnn", dtype="float32")
