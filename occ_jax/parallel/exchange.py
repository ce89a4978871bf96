"""Moves data between processes, and between the host of a process and all devices.

Every process draws, samples and verifies its own rows of a step's prompts: process p of P has rows
p·N/P to (p+1)·N/P, so the rows of all processes in order are those of a run with one process.
Arrays on devices are global. Numbers on the host are gathered, so that every process computes the
same metrics and takes the same decisions; only the first process writes. `processes.py` connects
the processes.

A run forbids transfers to and from devices that are not explicit. The transfers here are explicit;
where JAX has no explicit call for them, they are allowed by a local guard.
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
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def check_processes(config: Config, mesh: Mesh, **options: Any) -> None:
    """Checks that all processes were started with the same settings and use all devices.

    Args:
        config: config of this process.
        mesh: mesh of this process.
        options: other settings that must be equal on all processes; JSON values.

    Raises:
        UserError: configs, options or versions of JAX differ, or the mesh leaves devices unused.
    """
    num_processes = jax.process_count()
    if num_processes == 1:
        return
    options["version of jax"] = jax.__version__
    first, *others = gather_objects({"config": to_dict(config), "options": options})
    for process, other in enumerate(others, start=1):
        different = differences(from_dict(first["config"]), from_dict(other["config"]))
        for name, value in first["options"].items():
            if other["options"].get(name) != value:
                different[name] = (value, other["options"].get(name))
        if different:
            listed = ", ".join(f"{name} {a!r} and {b!r}" for name, (a, b) in different.items())
            raise UserError(f"processes 0 and {process} have different configs: {listed}")
    if mesh.size != jax.device_count():
        raise UserError(
            f"the mesh has {mesh.size} places; with {num_processes} processes it must have as "
            f"many as there are devices ({jax.device_count()})"
        )


def process_rows(count: int) -> slice:
    """Slice of this process in `count` rows; the last processes may get fewer, or none."""
    size = -(-count // jax.process_count())
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def put_process_rows(mesh: Mesh, own: np.ndarray) -> jax.Array:
    """Global array with rows sharded over the mesh, from the rows of this process alone."""
    shape = (own.shape[0] * jax.process_count(), *own.shape[1:])
    if jax.process_count() == 1 or not _process_rows_are_local(mesh, shape[0]):
        return put_all_rows(mesh, gather_rows(own))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_process_local_data(row_sharding(mesh), own, shape)


def put_all_rows(mesh: Mesh, whole: np.ndarray) -> jax.Array:
    """Global array with rows sharded over the mesh, from all rows, which every process has."""
    if jax.process_count() == 1:
        return jax.device_put(whole, row_sharding(mesh))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(
            whole.shape, row_sharding(mesh), lambda index: whole[index]
        )


def get_process_rows(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """Rows of this process, on the host, from a global array with rows sharded over the mesh."""
    if jax.process_count() == 1 or not _process_rows_are_local(mesh, array.shape[0]):
        return get_all_rows(array)[process_rows(array.shape[0])]
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate(jax.device_get([parts[start] for start in sorted(parts)]))


def get_all_rows(array: jax.Array) -> np.ndarray:
    """All rows of a global array with any sharding, on the host of every process."""
    return jax.device_get(array) if jax.process_count() == 1 else _all_gathered(array)


def _process_rows_are_local(mesh: Mesh, count: int) -> bool:
    """Whether the devices of every process hold rows of that process only."""
    size = count // jax.process_count()
    for device, (index, *_) in row_sharding(mesh).devices_indices_map((count,)).items():
        start, stop, _ = index.indices(count)
        if start < device.process_index * size or stop > (device.process_index + 1) * size:
            return False
    return True


def gather_rows(own: np.ndarray) -> np.ndarray:
    """Rows of all processes, in their order; float64 becomes float32 if there are several."""
    if jax.process_count() == 1:
        return own
    own = own.astype(np.float32) if own.dtype == np.float64 else own
    return _all_gathered(own)


def _all_gathered(array: jax.Array | np.ndarray) -> np.ndarray:
    with jax.transfer_guard("allow"):  # it moves host arrays through the devices
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather_objects(own: Any) -> list[Any]:
    """JSON values of all processes, in the order of the processes."""
    if jax.process_count() == 1:
        return [own]
    text = np.frombuffer(json.dumps(own).encode(), np.uint8)
    sizes = gather_rows(np.array([text.size], np.int32))
    padded = gather_rows(np.pad(text, (0, int(sizes.max()) - text.size))[None])
    return [
        json.loads(row[:size].tobytes().decode()) for row, size in zip(padded, sizes, strict=True)
    ]


def on_first_process(function: Callable[[], _T]) -> _T:
    """Calls `function` on the first process; every process gets its result, or its `UserError`.

    Args:
        function: returns a JSON value.

    Returns:
        Result of the first process.

    Raises:
        UserError: the call on the first process raised it.
    """
    if jax.process_count() == 1:
        return function()
    outcome: Any = None
    if is_first_process():
        try:
            outcome = {"value": function()}
        except UserError as error:
            outcome = {"error": str(error)}
    outcome = gather_objects(outcome)[0]
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def put_replicated(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """Small array that every process has, replicated on all devices."""
    if jax.process_count() == 1:
        return jax.device_put(value, replicated(mesh))
    with jax.transfer_guard("allow"):
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda _: value)


def fold_in(mesh: Mesh, key: Key[Array, ""], *numbers: int) -> Key[Array, ""]:
    """Folds `numbers` into the key, one after the other (`jax.random.fold_in`)."""
    return _folded(key, put_replicated(mesh, np.array(numbers, np.uint32)))


@jax.jit
def _folded(key: Key[Array, ""], numbers: UInt32[Array, " N"]) -> Key[Array, ""]:
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
