"""What is each process's own and what is everybody's, in a run of one process or of several.

Every process draws, samples and judges a block of a step's prompts: process h of H has prompts
h·N/H to (h+1)·N/H, so that the rows of all processes in order are those of a run of one. Arrays on
devices are global. Numbers on the host are gathered, so that every process computes the same
metrics and takes the same decisions; only the first writes.

What is moved to and from the devices here is asked for; where JAX has no word for that, the guard
against transfers that nobody asked for is lifted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Key, UInt32

from occ_jax.config import Config, differences, from_dict, to_dict
from occ_jax.errors import UserError
from occ_jax.parallel.sharding import replicated, row_sharding

_T = TypeVar("_T")


def is_first_process() -> bool:
    """Whether this process writes files and speaks to people."""
    return jax.process_index() == 0


def check_processes(config: Config, mesh: Mesh, **options: Any) -> None:
    """Refuses what several processes cannot do together.

    Args:
        config: of this process.
        mesh: of this process.
        options: what else all must have been asked for alike; JSON values.

    Raises:
        UserError: their configs, options or versions of JAX differ, or devices are left over.
    """
    hosts = jax.process_count()
    if hosts == 1:
        return
    options["version of jax"] = jax.__version__
    first, *others = gather_objects({"config": to_dict(config), "options": options})
    for process, other in enumerate(others, start=1):
        found = differences(from_dict(first["config"]), from_dict(other["config"]))
        for name, value in first["options"].items():
            if other["options"].get(name) != value:
                found[name] = (value, other["options"].get(name))
        if found:
            listed = ", ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in found.items())
            raise UserError(f"processes 0 and {process} have different configs: {listed}")
    if mesh.size != jax.device_count():
        raise UserError(
            f"the mesh has {mesh.size} places; with {hosts} processes it must have as many as "
            f"there are devices ({jax.device_count()})"
        )


def process_rows(count: int) -> slice:
    """This process's part of `count` things; of those that H does not divide the last have less."""
    size = -(-count // jax.process_count())
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def put_process_rows(mesh: Mesh, own: np.ndarray) -> jax.Array:
    """The global array, rows over the mesh, of which `own` is this process's block."""
    shape = (own.shape[0] * jax.process_count(), *own.shape[1:])
    if jax.process_count() == 1 or not _process_rows_are_local(mesh, shape[0]):
        return put_all_rows(mesh, gather_rows(own))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(row_sharding(mesh), own, shape)


def put_all_rows(mesh: Mesh, whole: np.ndarray) -> jax.Array:
    """The global array, rows over the mesh, that every process has the whole of."""
    if jax.process_count() == 1:
        return jax.device_put(whole, row_sharding(mesh))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(
            whole.shape, row_sharding(mesh), lambda index: whole[index]
        )


def get_process_rows(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """This process's block of an array whose rows lie over the mesh, on the host."""
    if jax.process_count() == 1 or not _process_rows_are_local(mesh, array.shape[0]):
        return get_all_rows(array)[process_rows(array.shape[0])]
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))


def get_all_rows(array: jax.Array) -> np.ndarray:
    """A global array, however it lies, on the host of every process."""
    return jax.device_get(array) if jax.process_count() == 1 else _all_gathered(array)


def _process_rows_are_local(mesh: Mesh, count: int) -> bool:
    """Whether every process's devices hold rows of its block alone."""
    size = count // jax.process_count()
    for device, (index, *_) in row_sharding(mesh).devices_indices_map((count,)).items():
        start, stop, _ = index.indices(count)
        if start < device.process_index * size or stop > (device.process_index + 1) * size:
            return False
    return True


def gather_rows(own: np.ndarray) -> np.ndarray:
    """The blocks of all processes, one after the other; of several in 32 bits."""
    if jax.process_count() == 1:
        return own
    own = own.astype(np.float32) if own.dtype == np.float64 else own
    return _all_gathered(own)


def _all_gathered(array: jax.Array | np.ndarray) -> np.ndarray:
    with jax.transfer_guard("allow"):  # its way leads over the devices
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather_objects(own: Any) -> list[Any]:
    """What every process has to say, in their order; JSON values."""
    if jax.process_count() == 1:
        return [own]
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = gather_rows(np.array([text.size], np.int32))
    padded = gather_rows(np.pad(text, (0, int(sizes.max()) - text.size))[None])
    return [
        json.loads(row[:size].tobytes().decode()) for row, size in zip(padded, sizes, strict=True)
    ]


def on_first_process(function: Callable[[], _T]) -> _T:
    """What `function` returns, a JSON value, or refuses on the first process, for all of them."""
    if jax.process_count() == 1:
        return function()
    said: Any = None
    if is_first_process():
        try:
            said = {"value": function()}
        except UserError as error:
            said = {"error": str(error)}
    said = gather_objects(said)[0]
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def put_replicated(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """A small array that every process has, on all devices."""
    if jax.process_count() == 1:
        return jax.device_put(value, replicated(mesh))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda _: value)


def fold_in(mesh: Mesh, key: Key[Array, ""], *numbers: int) -> Key[Array, ""]:
    """`jax.random.fold_in` by one number after the other."""
    return _folded(key, put_replicated(mesh, np.array(numbers, np.uint32)))


@jax.jit
def _folded(key: Key[Array, ""], numbers: UInt32[Array, " N"]) -> Key[Array, ""]:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
