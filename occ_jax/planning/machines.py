"""Machines to compile for: TPU slices by name, or virtual devices of the CPU's compiler.

Owns the memory of each kind of device; nothing here needs a TPU or allocates an array.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from occ_jax.errors import UserError

GIB = 2**30

# Memory of one device for arrays and programs, GiB, by JAX's name of the kind: what the compiler
# names when it refuses a program ("exceeds available HBM", libtpu 0.0.42). Google Cloud publishes
# 16, 95, 32 and, for two devices, 192 (cloud.google.com/tpu/docs/v5e, /v5p, /v6e, /tpu7x).
HBM_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}

# Slices to try where none is named, least memory first, by their number of devices.
_SLICES = {
    4: ("v5e:2x2", "v6e:2x2", "v5p:2x2x1"),
    8: ("v5e:2x4", "v6e:2x4", "v5p:2x2x2"),
    16: ("v5e:4x4", "v6e:4x4", "v5p:2x2x4"),
    32: ("v5e:4x8", "v6e:4x8", "v5p:2x4x4"),
    64: ("v5e:8x8", "v6e:8x8", "v5p:4x4x4"),
    128: ("v5e:8x16", "v6e:8x16", "v5p:4x4x8"),
    256: ("v5e:16x16", "v6e:16x16", "v5p:4x8x8"),
    512: ("v5p:8x8x8",),
}


class Machine(NamedTuple):
    """Devices to compile for."""

    name: str
    devices: tuple[Any, ...]
    memory: int | None  # bytes of one device; None if unknown


def topology(name: str) -> Machine:
    """Returns a TPU slice such as v5e:4x4 or v5p:4x4x8; no TPU is needed.

    Raises:
        UserError: libtpu is not installed or knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name} needs the compiler for TPUs: pip install 'occ_jax[plan]' in an "
            "environment of its own; --devices N plans with the CPU's compiler instead"
        )
    # Keeps libtpu from asking where it runs: on no TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # A compiler may be loaded several times at once, a driver not.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except RuntimeError as error:
        message = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology {name}: {message} (such as v5e:4x4, v5p:4x4x8)") from error
    kind = devices[0].device_kind
    if kind not in HBM_GIB:
        known = ", ".join(HBM_GIB)
        raise UserError(
            f"--topology {name}: the memory of a {kind} is not known, only that of {known}"
        )
    return Machine(name, tuple(devices), int(HBM_GIB[kind] * GIB))


def virtual(count: int, memory_gib: float | None) -> Machine:
    """Returns `count` devices of the CPU's compiler, each with the given memory.

    Raises:
        UserError: this process has started with fewer.
    """
    # A process that has started its backend keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--devices is {count}; this process has started with {len(devices)}")
    memory = None if memory_gib is None else int(memory_gib * GIB)
    return Machine(f"{count} virtual devices", tuple(devices[:count]), memory)


def slices(count: int) -> tuple[str, ...]:
    """Returns the names of slices with `count` devices, those with least memory first.

    Raises:
        UserError: there is none.
    """
    if count not in _SLICES:
        counts = ", ".join(map(str, _SLICES))
        raise UserError(
            f"the mesh needs {count} devices; name a slice of as many with --topology, or set "
            f"--mesh.* so that the number is one of {counts}"
        )
    return _SLICES[count]
