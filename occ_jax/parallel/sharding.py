"""The device mesh and the one table that says how every array lies on it.

Mesh axes: `data` replicates parameters, `fsdp` shards them, `tensor` splits heads and feed-forward
width, `expert` splits the experts of a mixture and is one more axis of rows everywhere else. What
the dimensions of an array are *called* decides which axes they lie over, for parameters, optimizer
state, activations and caches alike; no function below the train step names an axis, but for the
dispatch of tokens to experts (`occ_jax.models.moe`).

Where arrays come from outside (`jax.jit`'s arguments and results) the mesh is an argument here.
Inside a model it is the one that `on_mesh` put around the trace, so that a model is the same pure
function of its parameters with a mesh and without.
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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from occ_jax.config import MeshConfig
from occ_jax.errors import UserError
from occ_jax.types import Params, Rows, map_rows

AXES = ("data", "fsdp", "tensor", "expert")

# Dimension -> mesh axes, of which it takes in this order what no dimension before it has taken and
# what divides it.
#   rows       A step's rows lie over every axis that does not split a row's own arithmetic: outside
#              the experts the expert axis would else repeat all work.
#   residual   Of a parameter: the side that reads or writes the residual stream. Over fsdp and
#              expert, as both hold rows: with fsdp alone the 7.4e9 parameters of GLM-4.5-Air that
#              are in no expert would be held as often as there are places on the expert axis, with
#              gradients and moments 118 GB in float32. Experts have taken the expert axis already
#              and lie over fsdp.
_LOGICAL: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp", "expert"),
    "experts": ("expert",),
    "residual": ("fsdp", "expert"),
    "heads": ("tensor",),
    "width": ("tensor",),
    "vocabulary": ("tensor",),
}
ROWS = _LOGICAL["rows"]

Names = tuple[str | None, ...]
"""What the dimensions of an array are called; None for one that is never split."""

_READS: Names = ("residual", "width")
_WRITES: Names = ("width", "residual")
_NARROW: Names = ("residual", None)  # to few or to compressed dimensions that all heads share

# Last names of a parameter's path -> what its last dimensions are called; a kernel is [in, out].
# Dimensions in front, the repeats of a scanned segment, are not split.
_PARAMETERS: dict[tuple[str, ...], Names] = {
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
    ("up", "kernel"): _READS,
    ("down", "kernel"): _WRITES,
    ("query_down", "kernel"): _NARROW,
    ("latent_down", "kernel"): _NARROW,
    ("shared_key", "kernel"): _NARROW,
    ("qkv", "kernel"): _NARROW,
    ("beta", "kernel"): _NARROW,
    ("decay", "kernel"): _NARROW,
    ("experts", "gate"): ("experts", *_READS),
    ("experts", "up"): ("experts", *_READS),
    ("experts", "down"): ("experts", *_WRITES),
    ("projection", "kernel"): _WRITES,
}

# Whether what is being traced was given weights as products read them, by `gathering_once`.
_gathered_before: ContextVar[bool] = ContextVar("_gathered_before", default=False)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of as many of the first devices as it has places, with automatic axes.

    Args:
        config: places along every axis.
        devices: this process's unless given.

    Raises:
        UserError: fewer devices than the mesh has places.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    needed = math.prod(shape)
    devices = jax.devices() if devices is None else devices
    if len(devices) < needed:
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"the mesh ({sizes}) needs {needed} devices; this process sees {len(devices)}"
        )
    # An axis may lie on a part of one of the torus's: with four of them, few meshes fit otherwise.
    placed = create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def on_mesh(mesh: Mesh, function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function`, to be jitted, whose `constrain`s and experts mean `mesh`."""

    @functools.wraps(function)
    def traced(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, **options)

    return traced


def gathering_once(
    mesh: Mesh, dtype: Any, function: Callable[Concatenate[Params, _Arguments], _Result]
) -> Callable[Concatenate[Params, _Arguments], _Result]:
    """`on_mesh` for a function that reads all parameters many times, as sampling does.

    Its weights are gathered before it begins, whole but for what `tensor` and `expert` split, and
    rounded to the type of the products, which is all that products ever see of them.

    Args:
        mesh: where the parameters lie.
        dtype: of the products.
        function: of parameters and more.
    """

    def run(params: Params, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        ready = _gather_all(params, dtype, experts=True)
        before = _gathered_before.set(True)
        try:
            return function(ready, *arguments, **options)
        finally:
            _gathered_before.reset(before)

    return on_mesh(mesh, run)


def current_mesh() -> AbstractMesh | None:
    """The mesh that `on_mesh` put here; None without one, or where it is a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.size > 1 else None


def constrain(x: Array, *names: str | None) -> Array:
    """`x` lying on the current mesh as the names of its last dimensions say.

    Dimensions in front are not split. The same holds of the cotangent. Without a mesh it is `x`.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(mesh, names, x.shape))


def for_every_place(x: Array, count: int, *names: str | None) -> Array:
    """A copy of `x` for each of the P places that `count` rows lie over, [P, ...].

    For what rows read in a loop: what a place's rows give to the gradient adds up in its own copy,
    and the places' once, after the loop. Of one `x` for all they would be added up in every turn.

    Args:
        x: lies whole on every place of rows.
        count: of the rows.
        names: what the dimensions of `x` are called.
    """
    mesh, places = current_mesh(), 1
    if mesh is not None:
        lying = NamedSharding(mesh, spec_of(mesh, ("rows",), (count,)))
        places = count // lying.shard_shape((count,))[0]
    return constrain(jnp.broadcast_to(x, (places, *x.shape)), "rows", *names)


def spec_of(mesh: Mesh | AbstractMesh, names: Names, shape: Sequence[int]) -> P:
    """Where an array lies whose last dimensions have these names.

    An axis is used once, by the first dimension that asks for it. One that does not divide a
    dimension leaves it whole: `Config` refuses the meshes for which that costs anything.
    """
    taken: set[str] = set()
    found: list[str | tuple[str, ...] | None] = [None] * (len(shape) - len(names))
    for name, size in zip(names, shape[len(shape) - len(names) :], strict=True):
        chosen: list[str] = []
        for axis in _LOGICAL[name] if name is not None else ():
            places = math.prod(mesh.shape[other] for other in (*chosen, axis))
            if axis not in taken and size % places == 0:
                chosen.append(axis)
        taken.update(chosen)
        found.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    return P(*found)


def parameter_spec(mesh: Mesh | AbstractMesh, path: tuple[Any, ...], shape: Sequence[int]) -> P:
    """Where the parameter at the end of a path lies; whole where the table does not name it.

    Optimizer moments end in the path of the parameter they belong to, so they follow it.
    """
    names = _parameter_names(path, shape)
    return P() if names is None else spec_of(mesh, names, shape)


def layer_spec(mesh: AbstractMesh, path: tuple[Any, ...], shape: Sequence[int]) -> P:
    """Where a parameter lies that a layer is given: as stored, unless it was gathered before."""
    names = _parameter_names(path, shape)
    if names is not None and _gathered_before.get():
        names = _as_read(names)
    return P() if names is None else spec_of(mesh, names, shape)


def _parameter_names(path: tuple[Any, ...], shape: Sequence[int]) -> Names | None:
    last = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path[-2:])
    names = _PARAMETERS.get(last)
    return names if names is not None and len(names) <= len(shape) else None


def gathered(params: Params, dtype: Any) -> Params:
    """A layer's parameters as its products read them: split by `tensor` alone.

    Said here and not left to XLA's partitioner, which meets an axis twice in a product, in the rows
    of one operand and in the summed dimension of the other, and has more than one way out, some of
    which cost more than the weights' way over the links (docs/sharding.md).
    Gradients are added up where the parameter is stored, in the type they are worked out in.

    Args:
        params: of one layer, whole or without the repeats of its segment. Experts stay where they
            are (`occ_jax.models.moe`).
        dtype: of the products; weights are rounded to it before they travel.
    """
    if current_mesh() is None or _gathered_before.get():
        return params
    return _gather_all(params, dtype, experts=False)


def _gather_all(params: Params, dtype: Any, *, experts: bool) -> Params:
    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        names = _parameter_names(path, leaf.shape)
        if names is None or "residual" not in names or ("experts" in names and not experts):
            return leaf
        return _gather(leaf.astype(dtype), names)

    return jax.tree_util.tree_map_with_path(gather, params)


def _as_read(names: Names) -> Names:
    """How a weight lies that products are about to read."""
    return tuple(None if name == "residual" else name for name in names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: Array, names: Names) -> Array:
    return constrain(weight, *_as_read(names))


def _gather_forward(weight: Array, names: Names) -> tuple[Array, None]:
    return _gather(weight, names), None


def _gather_backward(names: Names, _: None, cotangent: Array) -> tuple[Array]:
    return (constrain(cotangent, *names),)


_gather.defvjp(_gather_forward, _gather_backward)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """A sharding for every leaf of a train state, parameter tree or optimizer state.

    Args:
        mesh: from `make_mesh`.
        state: arrays or `jax.ShapeDtypeStruct`s.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(mesh, path, leaf.shape)), state
    )


def abstract(mesh: Mesh, shapes: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with the sharding that every leaf is to have."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def rows(mesh: Mesh, dimension: int = 0) -> NamedSharding:
    """Rows of a batch, in the given dimension, over all axes that hold rows."""
    return NamedSharding(mesh, P(*[None] * dimension, ROWS))


def row_shardings(mesh: Mesh, fields: Any) -> Any:
    """A sharding for every field of a `Rollout` or `Batch`, of the class or of what one holds."""
    if isinstance(fields, type):
        every_field: Any = fields
        fields = every_field(*every_field._fields)
    return map_rows(lambda _, dimension: rows(mesh, dimension), fields)


def micro_batches(batch: Rows, count: int) -> Rows:
    """Rows [B] of a batch or a rollout to [M, B/M], M in front."""

    def split(x: Array, rows: int) -> Array:
        shape = (*x.shape[:rows], count, x.shape[rows] // count, *x.shape[rows + 1 :])
        pieces = jnp.moveaxis(x.reshape(shape), rows, 0)
        # Neighbouring rows lie on few of the devices: left there, a micro-batch would cost each
        # device as much as the whole mini-batch does. Dealing tokens out again is cheap.
        return constrain(pieces, "rows", *[None] * (x.ndim - rows - 1))

    return map_rows(split, batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())
