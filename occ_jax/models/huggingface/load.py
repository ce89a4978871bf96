"""From a Hugging Face directory into sharded parameters, one tensor at a time.

A leaf of one published tensor is that tensor put on the devices; a leaf stacked of many is
allocated there once, and every tensor is written into its place by a donated update. Tensors travel
in the type they are stored in, and every process reads the rows and columns of its own devices
only, so a host never holds more than one tensor besides what its devices do.
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from occ_jax.config import MeshConfig, ModelConfig
from occ_jax.errors import UserError
from occ_jax.models.huggingface.families import (
    find_family,
    num_modules,
    read_config,
)
from occ_jax.models.huggingface.files import CONFIG, Checkpoint, open_checkpoint
from occ_jax.models.huggingface.names import (
    LeafPath,
    Piece,
    Stored,
    leaf_at,
    left_out,
    plan,
    stored_shape,
)
from occ_jax.models.huggingface.values import Values
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import make_mesh, state_shardings
from occ_jax.types import Params

_COMPARED_BYTES = 1 << 24  # at once, of a tensor and its copy


class Layout(NamedTuple):
    """What a checkpoint's tensors are to a model."""

    checkpoint: Checkpoint
    stored: list[Stored]
    carried: list[str]
    """Tensors the model does not hold."""
    shapes: Params
    """Of the parameters: `jax.ShapeDtypeStruct`s."""


def load_pretrained(
    directory: str | Path, *, config: ModelConfig | None = None, mesh: Mesh | None = None
) -> tuple[Model, Params]:
    """A model and its parameters, MTP modules included, from a Hugging Face directory.

    Args:
        directory: holds config.json, model.safetensors or shards with an index; see
            docs/checkpoints.md for the families.
        config: from `read_config`, for types, stacking and the number of modules; None for its
            defaults.
        mesh: where the parameters go; None for one device.

    Returns:
        The model, whose config names the directory, and {"trunk": ..., "mtp": ...} in
        `config.param_dtype`, sharded as `occ_jax.parallel.sharding` says.

    Raises:
        UserError: naming the file, and the tensor or key, that is missing, damaged, of the wrong
            shape or not supported.
    """
    path = Path(directory)
    config = read_config(path) if config is None else check_config(path, config)
    layout = read_layout(config)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    return Model(config), _load(layout, mesh)


def read_layout(config: ModelConfig) -> Layout:
    """Reads the headers of `config.checkpoint` and checks every tensor's name, shape and scales.

    Raises:
        UserError: as `load_pretrained`.
    """
    checkpoint = open_checkpoint(Path(config.checkpoint))
    tensors = checkpoint.tensors
    names = find_family(Values(checkpoint.directory / CONFIG, checkpoint.config)).names
    count = num_modules(checkpoint.directory, checkpoint.config, tensors)
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    stored = list(plan(config, names, count, tensors))
    held: set[str] = set()
    for entry in stored:
        if entry.name not in tensors:
            module = entry.pieces[0].path[0] == "mtp"
            raise UserError(
                f"{checkpoint.directory} has no tensor {entry.name}, which {CONFIG} asks for"
                + ("; num_mtp_modules 0 loads the model without its modules" if module else "")
            )
        expected = stored_shape(entry, functools.partial(leaf_at, shapes))
        if tensors[entry.name].shape != expected:
            raise UserError(
                f"{checkpoint.where(entry.name)} has shape {list(tensors[entry.name].shape)}; "
                f"{CONFIG} makes it {list(expected)}"
            )
        held.add(entry.name)
        scale = checkpoint.scale_of(entry.name)
        if scale is not None:
            held.add(scale)
    carried = [name for name in tensors if name not in held]
    prefixes = left_out(config, names, count)
    for name in carried:
        known = name.startswith(prefixes) or any(re.search(p, name) for p in names.others)
        if not known:
            raise UserError(
                f"{checkpoint.where(name)} has no place in the model that {CONFIG} describes"
            )
    return Layout(checkpoint, stored, carried, shapes)


def check_config(directory: Path, config: ModelConfig) -> ModelConfig:
    """`config` with `directory` as its checkpoint.

    Raises:
        UserError: the directory is of another model, or has too few modules.
    """
    own = read_config(
        directory,
        config,
        num_mtp_modules=config.num_mtp_modules,
        mtp_trunk_hidden=config.mtp_trunk_hidden,
    )
    for field in dataclasses.fields(ModelConfig):
        asked, found = getattr(config, field.name), getattr(own, field.name)
        if field.name != "checkpoint" and asked != found:
            raise UserError(f"model.{field.name} is {asked!r}; {directory / CONFIG} says {found!r}")
    return own


def _load(layout: Layout, mesh: Mesh) -> Params:
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
            place = _placer(
                sharding,
                shape.dtype,
                transposed=entry.layout != "plain",
                block=checkpoint.block[1] if scales is not None else 0,
            )
            # Waiting keeps one tensor in flight, and with it one tensor in the host's memory.
            leaves[piece.path] = jax.block_until_ready(place(leaf, raw, scales, piece.index))
    paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
    keys = [tuple(step.key for step in path) for path, _ in paths]
    return jax.tree.unflatten(jax.tree.structure(shapes), [leaves[key] for key in keys])


def _put(
    checkpoint: Checkpoint,
    entry: Stored,
    piece: Piece,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> tuple[jax.Array, jax.Array | None]:
    """A piece as it is stored, on the devices that will need it, and its scales row by row."""
    values = checkpoint.read(entry.name)
    if entry.layout == "convolution":
        values = values[:, 0]
    spec = P(*(*sharding.spec, *[None] * leaf.ndim)[len(piece.index) : leaf.ndim])
    shape = leaf.shape[len(piece.index) :]
    if entry.layout == "plain":
        axis = 0  # of the rows
    else:
        axis, spec = len(shape) - 2, P(*spec[:-2], spec[-1], spec[-2])
        shape = (*shape[:-2], shape[-1], shape[-2])

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        rows = _rows_of(piece, shape[axis], index[axis])
        return np.ascontiguousarray(values[(*index[:axis], rows, *index[axis + 1 :])])

    raw = jax.make_array_from_callback(shape, NamedSharding(sharding.mesh, spec), read)
    scales = checkpoint.scales(entry.name)
    if scales is None:
        return raw, None
    per_row = scales[np.arange(values.shape[0])[piece.rows] // checkpoint.block[0]]
    where = NamedSharding(sharding.mesh, P(spec[0], None))
    return raw, jax.make_array_from_callback(per_row.shape, where, lambda index: per_row[index])


def _rows_of(piece: Piece, size: int, chosen: slice) -> slice | np.ndarray:
    """Which rows of the stored tensor the `chosen` of a piece's `size` rows are."""
    if isinstance(piece.rows, np.ndarray):
        return piece.rows[chosen]
    first, (start, stop, _) = piece.rows.start or 0, chosen.indices(size)
    return slice(first + start, first + stop)


@functools.cache
def _placer(
    sharding: NamedSharding, dtype: Any, *, transposed: bool, block: int
) -> Callable[..., jax.Array]:
    """A jitted (leaf or None, stored values, scales, index) -> leaf with the values in it."""

    def place(
        leaf: jax.Array | None, raw: jax.Array, scales: jax.Array | None, index: tuple[Any, ...]
    ) -> jax.Array:
        if scales is not None:
            wide = jnp.repeat(scales, block, axis=1)[:, : raw.shape[1]]
            raw = raw.astype(jnp.float32) * wide
        if transposed:
            raw = jnp.swapaxes(raw, -1, -2)
        raw = raw.astype(dtype)
        if leaf is None:
            return raw
        start = (*index, *[0] * raw.ndim)
        return jax.lax.dynamic_update_slice(leaf, raw[(None,) * len(index)], start)

    return jax.jit(place, out_shardings=sharding, donate_argnums=0)


def _check_copy(checkpoint: Checkpoint, entry: Stored) -> None:
    """Refuses a copy of embedding or head that differs: only one of the two would be trained."""
    first, second = checkpoint.read(entry.copy_of), checkpoint.read(entry.name)
    rows = max(1, _COMPARED_BYTES // max(1, first[0].nbytes))
    for start in range(0, len(first), rows):
        chosen = slice(start, start + rows)
        if not np.array_equal(first[chosen], second[chosen], equal_nan=True):
            raise UserError(
                f"{checkpoint.where(entry.name)} differs from {entry.copy_of}, which it must repeat"
            )
