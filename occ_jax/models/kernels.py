"""Softmax attention over whole sequences: a platform's kernel, or plain operations in pieces.

All of it is causal, over rows whose real tokens are contiguous. Only `plain` makes an array of
columns by columns. The outputs of columns without a token are undefined and differ between the
kernels; no real column reads them.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from occ_jax.config import AttentionKernel
from occ_jax.models.pieces import map_in_pieces
from occ_jax.parallel.sharding import DimNames, current_mesh, spec_of

_BLOCK = 512  # columns of queries and of keys that a TPU processes at once
_LANES = 128


def choose_kernel(kernel: AttentionKernel, dtype: jnp.dtype, width: int) -> AttentionKernel:
    """Resolves `auto` for the platform of the trace; returns any other kernel as it is.

    Args:
        kernel: from the config.
        dtype: dtype of queries, keys and values.
        width: size of a head.
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
    """The platform of the mesh that `on_mesh` has set, which may be another than this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def attend_in_pieces(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    size: int,
) -> Float[Array, "B T H C"]:
    """The plain operations on `size` query columns at a time, recomputed in the backward pass."""
    columns = jnp.arange(query.shape[1])[None, :]

    def attend(query: Array, query_columns: Int[Array, "1 size"]) -> Array:
        causal = columns <= query_columns[0][:, None]
        mask = (causal[None] & valid[:, None, :])[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)

    return map_in_pieces(attend, (query, columns), axis=1, size=size)


def attend_by_lengths(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T H C"]:
    """For kernels that support padding on the right only: rotates every row until it is there.

    `scale` multiplies the scores; `implementation` is for `jax.nn.dot_product_attention`.
    """
    columns = query.shape[1]
    first = jnp.argmax(valid, axis=1)[:, None]
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)

    def rotate(x: Array, by: Array) -> Array:
        sources = (jnp.arange(columns)[None, :] + by) % columns
        return jnp.take_along_axis(x, sources[:, :, None, None], axis=1)

    out = jax.nn.dot_product_attention(
        *(rotate(x, first) for x in (query, key, value)),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return rotate(out, -first)


def attend_by_splash(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B T N C"],
    value: Float[Array, "B T N C"],
    valid: Bool[Array, "B T"],
    scale: float,
    names: DimNames,
) -> Float[Array, "B T H C"]:
    """The TPU's kernel; every device computes its own rows and heads.

    `names` are those of the dimensions of queries, keys and values. Columns that are not `valid`
    attend to each other.
    """
    columns, width = query.shape[1], query.shape[3]
    block = min(_BLOCK, math.ceil(columns / _LANES) * _LANES)
    padding = [(0, 0), (0, -columns % block), (0, 0), (0, -width % _LANES)]

    # Queries are scaled in the dtype of the products, as the kernel expects.
    query = (query * scale).astype(query.dtype)
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    segments = jnp.pad(valid, padding[:2]).astype(jnp.int32)
    run = functools.partial(_splash_rows, block=block, interpret=_platform() != "tpu")
    mesh = current_mesh()
    if mesh is not None:
        specs = [spec_of(mesh, names, x.shape) for x in (query, key, value)]
        rows = spec_of(mesh, names[:2], segments.shape)
        # The kernel's results do not say over which mesh axes they vary.
        run = jax.shard_map(run, in_specs=(*specs, rows), out_specs=specs[0], check_vma=False)
    return run(query, key, value, segments)[:, :columns, :, :width]


def _splash_rows(
    query: Array, key: Array, value: Array, segments: Array, *, block: int, interpret: bool
) -> Array:
    """The padded rows of one device."""
    # Importing Pallas takes half a second, which no other platform should pay.
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
        assert isinstance(out, jax.Array)  # residuals, not asked for, would make it a pair
        return jnp.swapaxes(out, 0, 1)

    return jax.vmap(row)(query, key, value, segments)
