"""The device mesh, and the one table that says how every array lies on it.

Mesh axes: `data` replicates parameters, `fsdp` shards them, `tensor` splits heads and feed-forward
width, `expert` splits the experts of a mixture and holds rows everywhere else. The *names* of an
array's dimensions decide which mesh axes split it. This holds for parameters, optimizer state,
activations and caches alike. No function below the train step names a mesh axis, except the
dispatch of tokens to experts (`occ_jax.models.moe`).

The arguments and results of `jax.jit` are placed here, by functions that take the mesh as an
argument. Inside a model the mesh is the one that `on_mesh` has set for the trace, so a model is the
same pure function of its parameters with a mesh and without one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array

from occ_jax.config import MeshConfig
from occ_jax.errors import UserError
from occ_jax.types import Params, RowFields, map_rows, row_axes

AXES = ("data", "fsdp", "tensor", "expert")

# Name of a dimension -> mesh axes that may split it. In this order, a dimension takes every axis
# that no earlier dimension has taken and that divides its size.
#   rows       Rows of a batch are split by every axis that does not split the arithmetic of one
#              row. Outside the experts, the expert axis would otherwise repeat all work.
#   residual   The side of a parameter that reads or writes the residual stream. Split by fsdp and
#              expert, as rows are: with fsdp alone, every device of the expert axis would hold a
#              copy of the 7.4e9 parameters of GLM-4.5-Air that are in no expert, which is 118 GB
#              with gradients and moments in float32. Experts have taken the expert axis already,
#              so their residual side is split by fsdp alone.
_LOGICAL: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "experts": ("expert",),
    "residual": ("fsdp", "expert"),
    "heads": ("tensor",),
    "width": ("tensor",),
    "vocabulary": ("tensor",),
}
ROW_AXES = _LOGICAL["rows"]

DimNames = tuple[str | None, ...]
"""Names of an array's last dimensions; None for a dimension that is never split."""

_READS: DimNames = ("residual", "width")
_WRITES: DimNames = ("width", "residual")
_NARROW: DimNames = ("residual", None)  # to few or to compressed dimensions that all heads share
_WHOLE: DimNames = ()  # one copy on every device

_NORMS = (
    *("mixer_norm", "feed_forward_norm", "final_norm", "embed_norm", "hidden_norm"),
    *("query_norm", "key_norm", "latent_norm", "norm"),
)

# The last two names of a parameter's path -> names of its last dimensions; a kernel is [in, out].
# Leading dimensions (the repeats of a scanned segment) are not split. A parameter that is missing
# here is an error: replicated by default, it would cost memory and nobody would notice.
_PARAMETERS: dict[tuple[str, str], DimNames] = {
    ("embed", "embedding"): ("vocabulary", "residual"),
    ("head", "kernel"): ("residual", "vocabulary"),
    ("query", "kernel"): ("residual", "heads"),
    ("key", "kernel"): ("residual", "heads"),
    ("value", "kernel"): ("residual", "heads"),
    ("query", "bias"): ("heads",),
    ("key", "bias"): ("heads",),
    ("value", "bias"): ("heads",),
    ("output", "kernel"): ("heads", "residual"),
    ("gate", "kernel"): _READS,
    ("gate", "bias"): _WHOLE,
    ("up", "kernel"): _READS,
    ("down", "kernel"): _WRITES,
    ("query_down", "kernel"): _NARROW,
    ("latent_down", "kernel"): _NARROW,
    ("shared_key", "kernel"): _NARROW,
    ("qkv", "kernel"): _NARROW,
    ("beta", "kernel"): _NARROW,
    ("decay", "kernel"): _NARROW,
    ("mixer", "convolution"): _WHOLE,
    ("mixer", "log_rate"): _WHOLE,
    ("mixer", "decay_bias"): _WHOLE,
    ("router", "kernel"): _WHOLE,
    ("router", "correction_bias"): _WHOLE,
    ("experts", "gate"): ("experts", *_READS),
    ("experts", "up"): ("experts", *_READS),
    ("experts", "down"): ("experts", *_WRITES),
    ("shared_gate", "kernel"): _WHOLE,
    ("projection", "kernel"): _WRITES,
    **{(norm, "scale"): _WHOLE for norm in _NORMS},
}

# Fields of `TrainState` and of the optimizers' states that belong to no single parameter: one copy
# on every device. Adam's moments end in the path of their parameter, so they follow it.
_STATE_FIELDS = {"step", "key", "count", "coefficient", "correlation", "penalty"}

# True while a function is traced whose weights `with_gathered_weights` has gathered already.
_weights_are_gathered: ContextVar[bool] = ContextVar("_weights_are_gathered", default=False)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with automatic axes from the first devices, as many as it needs.

    Args:
        config: size of every axis.
        devices: devices to choose from; None for all that this process sees.

    Raises:
        UserError: there are fewer devices than the mesh needs.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    needed = math.prod(shape)
    devices = jax.devices() if devices is None else devices
    if len(devices) < needed:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"the mesh ({sizes}) needs {needed} devices; this process sees {len(devices)}"
        )
    # A mesh axis may use a part of one axis of a TPU's torus; otherwise few meshes fit.
    ordered = create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_mesh(mesh: Mesh, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Returns `function`, to be jitted, with `mesh` as the current mesh while it is traced."""

    @functools.wraps(function)
    def traced(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, **options)

    return traced


def with_gathered_weights(
    mesh: Mesh, dtype: Any, function: Callable[Concatenate[Params, _Arguments], _Result]
) -> Callable[Concatenate[Params, _Arguments], _Result]:
    """`on_mesh` for a function that reads all parameters many times, such as sampling.

    The weights are gathered once, before `function` starts, which takes the parameters first: only
    `tensor` and `expert` still split them. They are rounded to `dtype`, the dtype of the matrix
    products, which read nothing else.
    """

    def run(params: Params, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        gathered = _gather_all(params, dtype, experts=True)
        token = _weights_are_gathered.set(True)
        try:
            return function(gathered, *arguments, **options)
        finally:
            _weights_are_gathered.reset(token)

    return on_mesh(mesh, run)


def current_mesh() -> AbstractMesh | None:
    """The mesh that `on_mesh` has set; None if there is none or if it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def constrain(x: Array, *names: str | None) -> Array:
    """Constrains `x`, and its cotangent, to the sharding of its dimension names.

    Leading dimensions without a name are not split. Without a mesh this returns `x` as it is.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(mesh, names, x.shape))


def copy_per_row_shard(x: Array, count: int, *names: str | None) -> Array:
    """Copies `x` once for each of the P shards of `count` rows: [P, ...]; `names` are those of `x`.

    For an array that rows read in a loop. The gradient of each shard adds up in its own copy, and
    the shards are summed once, after the loop. With a single `x`, every turn would sum them.
    """
    mesh, shards = current_mesh(), 1
    if mesh is not None:
        sharding = NamedSharding(mesh, spec_of(mesh, ("rows",), (count,)))
        shards = count // sharding.shard_shape((count,))[0]
    return constrain(jnp.broadcast_to(x, (shards, *x.shape)), "rows", *names)


def spec_of(mesh: Mesh | AbstractMesh, names: DimNames, shape: Sequence[int]) -> P:
    """The partition of an array whose last dimensions have these names.

    Each mesh axis splits one dimension at most: the first that may take it. An axis that does not
    divide a dimension does not split it; `Config` refuses the meshes for which that costs anything.
    """
    taken: set[str] = set()
    partitions: list[str | tuple[str, ...] | None] = [None] * (len(shape) - len(names))
    for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
        chosen: list[str] = []
        for axis in _LOGICAL[name] if name is not None else ():
            shards = math.prod(mesh.shape[other] for other in (*chosen, axis))
            if axis not in taken and size % shards == 0:
                chosen.append(axis)
        taken.update(chosen)
        partitions.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return P(*partitions)


def layer_spec(mesh: AbstractMesh, path: tuple[Any, ...], shape: Sequence[int]) -> P:
    """The partition of a parameter as a layer gets it: as stored, unless it was gathered before."""
    names = _dim_names(path, shape)
    return spec_of(mesh, _as_read(names) if _weights_are_gathered.get() else names, shape)


def _dim_names(path: tuple[Any, ...], shape: Sequence[int]) -> DimNames:
    keys = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    if keys[-1] in _STATE_FIELDS:
        return _WHOLE
    names = _PARAMETERS.get((keys[-2], keys[-1])) if len(keys) > 1 else None
    if names is None or len(names) > len(shape):
        raise ValueError(
            f"{'/'.join(keys)} of shape {tuple(shape)} is not in the sharding table: name its "
            "dimensions in occ_jax/parallel/sharding.py (_PARAMETERS, or _STATE_FIELDS)"
        )
    return names


def gather_weights(params: Params, dtype: Any) -> Params:
    """Gathers a layer's weights for its matrix products: only `tensor` still splits them.

    This is explicit because XLA's partitioner meets one mesh axis twice in a product, in the rows
    of one operand and in the summed dimension of the other. It has several ways to resolve that,
    and some cost more than sending the weights (docs/sharding.md). Gradients are summed where the
    parameter is stored, in the dtype in which they are computed.

    Args:
        params: parameters of one layer, with or without the repeats of its segment. Experts are
            left as they are (`occ_jax.models.moe` gathers them).
        dtype: dtype of the products; weights are rounded to it before they are sent.
    """
    if current_mesh() is None or _weights_are_gathered.get():
        return params
    return _gather_all(params, dtype, experts=False)


def _gather_all(params: Params, dtype: Any, *, experts: bool) -> Params:
    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _dim_names(path, leaf.shape)
        if "residual" not in names or ("experts" in names and not experts):
            return leaf
        return _gather(leaf.astype(dtype), names)

    return jax.tree_util.tree_map_with_path(gather, params)


def _as_read(names: DimNames) -> DimNames:
    """The dimension names of a weight that is ready for its products."""
    return tuple(None if name == "residual" else name for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: Array, names: DimNames) -> Array:
    return constrain(weight, *_as_read(names))


def _gather_forward(weight: Array, names: DimNames) -> tuple[Array, None]:
    return _gather(weight, names), None


def _gather_backward(names: DimNames, _: None, cotangent: Array) -> tuple[Array]:
    return (constrain(cotangent, *names),)


_gather.defvjp(_gather_forward, _gather_backward)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every leaf of a train state, a parameter tree or an optimizer state.

    Raises:
        ValueError: the table names neither a parameter nor a state field of a leaf's path and rank.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = _dim_names(path, leaf.shape)
        return NamedSharding(mesh, spec_of(mesh, names, leaf.shape) if names else P())

    return jax.tree_util.tree_map_with_path(place, state)


def abstract(mesh: Mesh, shapes: Any) -> Any:
    """The same `jax.ShapeDtypeStruct`s with the sharding of every leaf."""
    return jax.tree.map(lambda x, at: x.update(sharding=at), shapes, state_shardings(mesh, shapes))


def row_sharding(mesh: Mesh, dimension: int = 0) -> NamedSharding:
    """The sharding of an array whose rows are its given dimension."""
    return NamedSharding(mesh, P(*[None] * dimension, ROW_AXES))


def row_shardings(mesh: Mesh, kind: type[RowFields]) -> RowFields:
    """A sharding for every field of `Rollout` or `Batch`, also for those that may be None."""
    return kind._make(row_sharding(mesh, axis) for axis in row_axes(kind).values())


def micro_batches(fields: RowFields, count: int) -> RowFields:
    """Splits the rows [B] of a batch or a rollout into micro-batches: [M, B/M], M in front."""

    def split(x: Array, axis: int) -> Array:
        shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
        pieces = jnp.moveaxis(x.reshape(shape), axis, 0)
        # Neighbouring rows are on few devices. Without the constraint, a micro-batch would cost
        # each device as much as the whole mini-batch; redistributing tokens is cheap.
        return constrain(pieces, "rows", *[None] * (x.ndim - axis - 1))

    return map_rows(split, fields)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())
