"""Softmax attention of whole sequences, by the kernel of the platform or in pieces without one.

All of it is causal, over rows whose real tokens are neighbours. No path but `plain` makes an array
of columns by columns. What comes out of columns that hold no token differs between the paths and
means nothing: no real column reads it.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from occ_jax.config import AttentionKernel
from occ_jax.parallel.sharding import Names, current_mesh, spec_of

_BLOCK = 512  # columns of queries and of keys that a TPU works on at once
_LANES = 128


def choose(kernel: AttentionKernel, dtype: jnp.dtype, width: int) -> AttentionKernel:
    """What `auto` stands for where this is traced; every other kernel stands for itself.

    Args:
        kernel: the config's.
        dtype: of queries, keys and values.
        width: of a head.
    """
    if kernel != "auto":
        return kernel
    match _platform():
        case "tpu":
            return "splash"
        case "cuda" | "gpu" if dtype.itemsize == 2 and width % 8 == 0 and width <= 128:
            return "cudnn"
        case _:
            return "plain"


def _platform() -> str:
    """Of the mesh that `on_mesh` put here, which need not be this process's; else of JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def in_pieces(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    size: int,
) -> Float[Array, "B T H C"]:
    """The plain operations on `size` query columns at a time, made again for the backward pass."""
    columns = query.shape[1]
    padding = -columns % size
    padded = jnp.pad(query, [(0, 0), (0, padding), (0, 0), (0, 0)])
    pieces = jnp.moveaxis(padded.reshape(query.shape[0], -1, size, *query.shape[2:]), 1, 0)
    reads = jnp.arange(columns)[None, :]

    @jax.checkpoint
    def one(piece: tuple[Array, Array]) -> Array:
        queries, first = piece
        causal = reads <= first + jnp.arange(size)[:, None]
        mask = (causal[None] & valid[:, None, :])[:, None]
        return jax.nn.dot_product_attention(queries, key, value, mask=mask, scale=scale)

    out = jax.lax.map(one, (pieces, size * jnp.arange(len(pieces))))
    return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :columns]


def by_lengths(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T H C"]:
    """For kernels that know padding on the right only: rows are turned until theirs is.

    Args:
        query: of all columns.
        key: likewise.
        value: likewise.
        valid: columns of real tokens, neighbours.
        scale: of the scores.
        implementation: `jax.nn.dot_product_attention`'s.
    """
    columns = query.shape[1]
    first = jnp.argmax(valid, axis=1)[:, None]
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)

    def turned(x: Array, by: Array) -> Array:
        places = (jnp.arange(columns)[None, :] + by) % columns
        return jnp.take_along_axis(x, places[:, :, None, None], axis=1)

    out = jax.nn.dot_product_attention(
        turned(query, first),
        turned(key, first),
        turned(value, first),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return turned(out, -first)


def splash(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    names: Names,
) -> Float[Array, "B T H C"]:
    """The TPU's kernel, on every device for the rows and heads that lie there.

    Args:
        query: of all columns.
        key: likewise.
        value: likewise.
        valid: columns of real tokens; those without one attend among themselves.
        scale: of the scores.
        names: what the dimensions of the first three are called.
    """
    columns, width = query.shape[1], query.shape[3]
    block = min(_BLOCK, math.ceil(columns / _LANES) * _LANES)
    room = [(0, 0), (0, -columns % block), (0, 0), (0, -width % _LANES)]

    # Scores are scaled in the type of the products, as the kernel wants.
    query = (query * scale).astype(query.dtype)
    query, key, value = (jnp.pad(x, room) for x in (query, key, value))
    segments = jnp.pad(valid, room[:2]).astype(jnp.int32)
    interpret = _platform() != "tpu"

    def run(query: Array, key: Array, value: Array, segments: Array) -> Array:
        return _rows(query, key, value, segments, block=block, interpret=interpret)

    mesh = current_mesh()
    if mesh is not None:
        specs = [spec_of(mesh, names, x.shape) for x in (query, key, value)]
        rows = spec_of(mesh, names[:2], segments.shape)
        # The kernel's results carry no record of the axes that they vary over.
        spread = jax.shard_map(run, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)
        out = spread(query, key, value, segments)
    else:
        out = run(query, key, value, segments)
    return out[:, :columns, :, :width]


def _rows(
    query: Array, key: Array, value: Array, segments: Array, *, block: int, interpret: bool
) -> Array:
    """Padded rows of one device."""
    # Pallas takes half a second to import, which no other platform should pay.
    from jax.experimental.pallas.ops.tpu import splash_attention

    columns, heads = query.shape[1:3]
    causal = splash_attention.CausalMask((columns, columns))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([causal] * heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(query: Array, key: Array, value: Array, segments: Array) -> Array:
        by_head = (jnp.swapaxes(x, 0, 1) for x in (query, key, value))
        out = kernel(*by_head, segment_ids=splash_attention.SegmentIds(segments, segments))
        assert isinstance(out, jax.Array)  # a pair where residuals are asked for
        return jnp.swapaxes(out, 0, 1)

    return jax.vmap(row)(query, key, value, segments)
