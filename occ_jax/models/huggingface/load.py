"""Loads a Hugging Face directory into sharded parameters, one tensor at a time.

A parameter of one published tensor is that tensor on the devices. A parameter stacked from several
tensors is allocated once, and every tensor is written into it by a donated update. Tensors are sent
in their stored dtype. Every process reads only the rows and columns of its own devices, so a host
holds at most one tensor in addition to the parameters of its devices.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from occ_jax.config import MeshConfig, ModelConfig
from occ_jax.errors import UserError
from occ_jax.models.huggingface.families import published_names, read_config
from occ_jax.models.huggingface.names import (
    LeafPath,
    Piece,
    Stored,
    leaf_at,
    left_out,
    published_tensors,
    stored_shape,
)
from occ_jax.models.huggingface.tensors import CONFIG, Checkpoint, open_checkpoint
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import make_mesh, state_shardings
from occ_jax.types import Params

_COMPARED_BYTES = 1 << 24  # of a tensor and its copy, at once


class CheckpointLayout(NamedTuple):
    """The tensors of a checkpoint and the parameters of a model that they hold."""

    checkpoint: Checkpoint
    stored: list[Stored]
    carried: list[str]  # tensors that the model does not hold
    shapes: Params  # `jax.ShapeDtypeStruct`s of the parameters


def load_pretrained(
    directory: str | Path, *, config: ModelConfig | None = None, mesh: Mesh | None = None
) -> tuple[Model, Params]:
    """Loads a model and its parameters, MTP modules included, from a Hugging Face directory.

    Args:
        directory: has config.json and model.safetensors, or shards with an index;
            docs/checkpoints.md lists the families.
        config: from `read_config`, for dtypes, stacking and the number of modules; None for its
            defaults.
        mesh: mesh of the parameters; None for one device.

    Returns:
        The model, whose config names the directory, and {"trunk": ..., "mtp": ...} in
        `config.param_dtype`, sharded by `occ_jax.parallel.sharding`.

    Raises:
        UserError: a file, tensor or key is missing, damaged, of the wrong shape or not supported;
            the message names it.
    """
    path = Path(directory)
    config = read_config(path) if config is None else check_config(path, config)
    layout = read_layout(config)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    return Model(config), _load(layout, mesh)


def read_layout(config: ModelConfig) -> CheckpointLayout:
    """Reads the headers of `config.checkpoint`; checks the name, shape and scales of every tensor.

    Raises:
        UserError: as `load_pretrained`.
    """
    checkpoint = open_checkpoint(Path(config.checkpoint))
    tensors = checkpoint.tensors
    names, count = published_names(checkpoint.directory, checkpoint.config, tensors)
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    stored = list(published_tensors(config, names, count, tensors))
    held: set[str] = set()
    for entry in stored:
        if entry.name not in tensors:
            module = entry.pieces[0].path[0] == "mtp"
            raise UserError(
                f"{checkpoint.directory} has no tensor {entry.name}, which {CONFIG} asks for"
                + ("; num_mtp_modules 0 loads the model without its modules" if module else "")
            )
        expected = stored_shape(entry, shapes)
        if tensors[entry.name].shape != expected:
            raise UserError(
                f"{checkpoint.where(entry.name)} has shape {list(tensors[entry.name].shape)}; "
                f"{CONFIG} makes it {list(expected)}"
            )
        held.update(name for name in (entry.name, checkpoint.scale_of(entry.name)) if name)
    carried = [name for name in tensors if name not in held]
    prefixes = left_out(config, names, count)
    for name in carried:
        if not (name.startswith(prefixes) or any(re.search(p, name) for p in names.others)):
            raise UserError(
                f"{checkpoint.where(name)} has no place in the model that {CONFIG} describes"
            )
    return CheckpointLayout(checkpoint, stored, carried, shapes)


def check_config(directory: Path, config: ModelConfig) -> ModelConfig:
    """Returns `config` with `directory` as its checkpoint.

    Raises:
        UserError: the directory holds another model, or too few modules.
    """
    own = read_config(
        directory,
        config,
        num_mtp_modules=config.num_mtp_modules,
        mtp_trunk_hidden=config.mtp_trunk_hidden,
    )
    for field in dataclasses.fields(ModelConfig):
        given, published = getattr(config, field.name), getattr(own, field.name)
        if field.name != "checkpoint" and given != published:
            raise UserError(
                f"model.{field.name} is {given!r}; {directory / CONFIG} says {published!r}"
            )
    return own


def _load(layout: CheckpointLayout, mesh: Mesh) -> Params:
    checkpoint, shapes = layout.checkpoint, layout.shapes
    shardings = state_shardings(mesh, shapes)
    leaves: dict[LeafPath, jax.Array] = {}
    order = {name: number for number, name in enumerate(checkpoint.tensors)}
    for entry in sorted(layout.stored, key=lambda entry: order[entry.name]):
        if entry.copy_of:
            _check_copy(checkpoint, entry)
            continue
        for piece in entry.pieces:
            shape, sharding = (leaf_at(tree, piece.path) for tree in (shapes, shardings))
            leaf = leaves.get(piece.path)
            if leaf is None and piece.index:
                leaf = jnp.zeros(shape.shape, shape.dtype, device=sharding)
            raw, scales = _put(checkpoint, entry, piece, shape, sharding)
            block = checkpoint.block[1] if scales is not None else 0
            write = _writer(sharding, shape.dtype, transposed=entry.layout.transposed, block=block)
            # Without waiting, several tensors would be in the host's memory at once.
            leaves[piece.path] = jax.block_until_ready(write(leaf, raw, scales, piece.index))
    return jax.tree.map_with_path(lambda path, _: leaves[tuple(key.key for key in path)], shapes)


def _put(
    checkpoint: Checkpoint,
    entry: Stored,
    piece: Piece,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> tuple[jax.Array, jax.Array | None]:
    """Puts a piece, in its published order, on the devices that need it; also one scale per row."""
    values, layout = checkpoint.read(entry.name), entry.layout
    if layout.extra_axis:
        values = values[:, 0]
    spec = P(*layout.published((*sharding.spec, *[None] * leaf.ndim)[len(piece.index) : leaf.ndim]))
    shape = layout.published(leaf.shape[len(piece.index) :])
    axis = layout.rows_axis(len(shape))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        rows = _rows_of(piece, shape[axis], index[axis])
        return np.ascontiguousarray(values[(*index[:axis], rows, *index[axis + 1 :])])

    raw = jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, spec), read)
    scales = checkpoint.scales(entry.name)
    if scales is None:
        return raw, None
    per_row = scales[np.arange(values.shape[0])[piece.rows] // checkpoint.block[0]]
    by_row = NamedSharding(sharding.mesh, P(spec[0], None))
    return raw, jax.make_array_from_callback(per_row.shape, by_row, lambda index: per_row[index])


def _rows_of(piece: Piece, size: int, chosen: slice) -> slice | np.ndarray:
    """Rows of the published tensor for the `chosen` ones of a piece's `size` rows."""
    if isinstance(piece.rows, np.ndarray):
        return piece.rows[chosen]
    first, (start, stop, _) = piece.rows.start or 0, chosen.indices(size)
    return slice(first + start, first + stop)


@functools.cache
def _writer(
    sharding: NamedSharding, dtype: Any, *, transposed: bool, block: int
) -> Callable[..., jax.Array]:
    """A jitted function (leaf or None, stored values, scales, index) -> leaf with the values."""

    def write(
        leaf: jax.Array | None, raw: jax.Array, scales: jax.Array | None, index: tuple[Any, ...]
    ) -> jax.Array:
        if scales is not None:
            raw = raw.astype(jnp.float32) * jnp.repeat(scales, block, axis=1)[:, : raw.shape[1]]
        if transposed:
            raw = jnp.swapaxes(raw, -1, -2)
        raw = raw.astype(dtype)
        if leaf is None:
            return raw
        start = (*index, *[0] * raw.ndim)
        return jax.lax.dynamic_update_slice(leaf, raw[(None,) * len(index)], start)

    return jax.jit(write, out_shardings=sharding, donate_argnums=0)


def _check_copy(checkpoint: Checkpoint, entry: Stored) -> None:
    """Refuses a copy of embedding or head that differs, as only one of the two would be trained."""
    first, second = checkpoint.read(entry.copy_of), checkpoint.read(entry.name)
    rows = max(1, _COMPARED_BYTES // max(1, first[0].nbytes))
    for start in range(0, len(first), rows):
        chosen = slice(start, start + rows)
        if not np.array_equal(first[chosen], second[chosen], equal_nan=True):
            raise UserError(
                f"{checkpoint.where(entry.name)} differs from {entry.copy_of}, which it must repeat"
            )
