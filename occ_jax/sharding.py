"""The device mesh and the one table that says how every array lies on it.

Mesh axes: `data` replicates parameters, `fsdp` shards them, `tensor` splits heads and feed-forward
width; rows of a batch lie over data and fsdp together. Everything is expressed as `NamedSharding`s
that `jax.jit` propagates; no function below the train step names an axis.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from occ_jax.config import MeshConfig
from occ_jax.errors import UserError
from occ_jax.types import map_rows

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # mesh axes the rows of a batch are split over

_IN, _OUT = P("fsdp", "tensor"), P("tensor", "fsdp")  # reads, writes the residual stream

# Last names of a parameter's path -> how its last dimensions lie on the mesh; a kernel is
# [in, out]. Dimensions in front, repeats of a scanned segment and experts, are not split.
_RULES: dict[tuple[str, ...], P] = {
    ("embed", "embedding"): _OUT,
    ("head", "kernel"): _IN,
    ("query", "kernel"): _IN,
    ("key", "kernel"): _IN,
    ("value", "kernel"): _IN,
    ("query", "bias"): P("tensor"),
    ("key", "bias"): P("tensor"),
    ("value", "bias"): P("tensor"),
    ("output", "kernel"): _OUT,
    ("gate", "kernel"): _IN,
    ("up", "kernel"): _IN,
    ("down", "kernel"): _OUT,
    ("query_down", "kernel"): P("fsdp", None),
    ("latent_down", "kernel"): P("fsdp", None),
    ("shared_key", "kernel"): P("fsdp", None),
    ("qkv", "kernel"): P("fsdp", None),
    ("beta", "kernel"): P("fsdp", None),
    ("decay", "kernel"): P("fsdp", None),
    ("experts", "gate"): _IN,
    ("experts", "up"): _IN,
    ("experts", "down"): _OUT,
    # As everything that writes to the residual stream: the other way round XLA's partitioner (jax
    # 0.10 and 0.12) gives wrong numbers on some meshes with all three axes.
    ("projection", "kernel"): _OUT,
}


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh of the first data x fsdp x tensor devices, with automatic axes.

    Raises:
        UserError: fewer devices than the mesh has places.
    """
    shape = (config.data, config.fsdp, config.tensor)
    needed = config.data * config.fsdp * config.tensor
    devices = jax.devices()
    if len(devices) < needed:
        raise UserError(
            f"the mesh (data={config.data}, fsdp={config.fsdp}, tensor={config.tensor}) needs "
            f"{needed} devices; this process sees {len(devices)}"
        )
    return jax.make_mesh(
        shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:needed]
    )


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> P:
    """The rule of the path's last two names; a dimension the mesh does not divide is replicated.

    Optimizer moments end in the path of the parameter they belong to, so they follow it.
    """
    names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
    spec = _RULES.get(names[-2:])
    if spec is None or len(spec) > leaf.ndim:
        return P()
    spec = (*[None] * (leaf.ndim - len(spec)), *spec)
    return P(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape, strict=True)
        )
    )


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every leaf of a train state, parameter tree or optimizer state.

    Args:
        mesh: from `make_mesh`.
        state: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), state
    )


def abstract(mesh: Mesh, shapes: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with the sharding that every leaf is to have."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def rows(mesh: Mesh, dimension: int = 0) -> NamedSharding:
    """Rows of a batch, in the given dimension, over the data and fsdp axes."""
    return NamedSharding(mesh, P(*[None] * dimension, ROWS))


def row_shardings(mesh: Mesh, fields: Any) -> Any:
    """A sharding for every field of a `Rollout` or `Batch` that is there."""
    return map_rows(lambda _, dimension: rows(mesh, dimension), fields)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())
