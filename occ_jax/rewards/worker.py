"""A verifier process: reads completions from a socket and answers each with a verdict.

It must not load JAX, so this module imports nothing that does. `occ_jax.rewards.pool` starts it and
has the other side of the protocol. A message is a pickle after its length in 8 bytes:

    to the worker     [item, item, ...]   each a pickle of (verifier, completion, answer, record)
    from the worker   ("ready", None) once, or ("refused", message) if a verifier cannot be loaded
    from the worker   (score, given, error) for each item, in order, as soon as it is judged
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

from occ_jax.errors import UserError
from occ_jax.rewards import user, verifiers
from occ_jax.rewards.verifiers import Verdict

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LENGTH = struct.Struct("!Q")
Judge = Callable[[str, str, Mapping[str, Any]], Verdict]


class Settings(NamedTuple):
    """The arguments of a worker."""

    descriptor: int  # of the worker's end of the socket
    parent: int  # process id of the pool
    verifiers: tuple[str, ...]
    deadline: float  # seconds for one item
    memory: int  # bytes


def main(settings: Settings) -> None:
    """Judges items until the pool closes its end of the socket."""
    grace = 0.0 if _die_with(settings.parent) else 2 * settings.deadline + 5
    _limit(resource.RLIMIT_CORE, 0)
    # RLIMIT_DATA and not RLIMIT_AS, as libraries reserve far more address space than they use.
    _limit(resource.RLIMIT_DATA, settings.memory)
    with (
        socket.socket(fileno=settings.descriptor) as connection,
        connection.makefile("rb") as incoming,
    ):
        try:
            judges = {name: _load(name) for name in settings.verifiers}
        except UserError as error:
            _send(connection, ("refused", str(error)))
            return
        _send(connection, ("ready", None))
        while (items := _receive(incoming)) is not None:
            for item in items:
                if grace:
                    signal.setitimer(signal.ITIMER_REAL, grace)
                _send(connection, _judged(judges, item))
            if grace:
                signal.setitimer(signal.ITIMER_REAL, 0)


def _die_with(parent: int) -> bool:
    """Requests the kernel to kill this process when its parent ends; False if it cannot.

    If the pool's process is killed, nothing else ends a worker that hangs, and a worker that hangs
    in C code runs no signal handler. Only Linux has this request. Elsewhere a timer does the same
    by a signal without a handler, but a user's function that sets its own timer cancels it.
    """
    if sys.platform != "linux":
        return False
    requested = ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent:  # the parent ended before the request
        os._exit(1)
    return requested


def _load(name: str) -> Judge:
    if ":" in name:
        function = user.load_function(name)

        def judge(completion: str, answer: str, record: Mapping[str, Any]) -> Verdict:
            return Verdict(user.call(name, function, completion, answer, record), None)

        return judge
    if name == "math_verify":
        from occ_jax.rewards.symbolic import math_verify as verifier
    else:
        verifier = getattr(verifiers, name)
    return lambda completion, answer, _: verifier(completion, answer)


def _judged(judges: dict[str, Judge], item: bytes) -> tuple[float, str | None, str | None]:
    """(score, given, None), or (0, None, error) if the verifier failed."""
    try:
        name, *arguments = pickle.loads(item)
        score, given = judges[name](*arguments)
    except user.CallFailed as error:
        return 0.0, None, str(error)
    except BaseException as error:  # MemoryError and RecursionError among others
        return 0.0, None, f"a verifier raised {user.describe(error)}"
    return score, given, None


def _limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(kind, (limit, hard))


def _send(connection: socket.socket, message: Any) -> None:
    data = pickle.dumps(message)
    connection.sendall(LENGTH.pack(len(data)) + data)


def _receive(incoming: BinaryIO) -> Any:
    """The next message, or None if the pool has closed its end."""
    header = incoming.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(header)
    data = incoming.read(size)
    return pickle.loads(data) if len(data) == size else None
