# pyright: strict
"""A verifier process: takes completions from a socket, answers each with a verdict.

It must not load JAX, so this module and what it imports stay off everything that does. It is
started by `occ_jax.rewards.pool`, whose side of the protocol this is. Messages are pickles after
their length, 8 bytes:

    to the worker     [item, item, ...]   each (verifier, completion, answer, record), pickled apart
    from the worker   ("ready", None) once, or ("refused", message) where a verifier cannot be had
    from the worker   (score, given, error) for each item, in order, as soon as it is known
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from occ_jax.errors import UserError
from occ_jax.rewards import user, verifiers
from occ_jax.rewards.verifiers import Verdict

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LENGTH = struct.Struct("!Q")
Judge = Callable[[str, str, Mapping[str, Any]], Verdict]


class Settings(NamedTuple):
    """What a worker is started with."""

    descriptor: int  # of its end of the socket
    parent: int  # the pool's process
    verifiers: tuple[str, ...]
    deadline: float  # seconds for one item
    memory: int  # bytes


def main(settings: Settings) -> None:
    """Judges until the other end of the socket is closed."""
    grace = 0.0 if _ends_with(settings.parent) else 2 * settings.deadline + 5
    _limit(resource.RLIMIT_CORE, 0)
    # Not the address space, of which libraries reserve far more than they use.
    _limit(resource.RLIMIT_DATA, settings.memory)
    with socket.socket(fileno=settings.descriptor) as connection:
        try:
            judges = {name: _load(name) for name in settings.verifiers}
        except UserError as error:
            _send(connection, ("refused", str(error)))
            return
        _send(connection, ("ready", None))
        while (items := _receive(connection)) is not None:
            for item in items:
                if grace:
                    signal.setitimer(signal.ITIMER_REAL, grace)
                _send(connection, _judged(judges, item))
            if grace:
                signal.setitimer(signal.ITIMER_REAL, 0)


def _ends_with(parent: int) -> bool:
    """Asks the kernel to kill this process when its parent ends; False where it does not know how.

    Should the pool's process be killed, nobody is left to end a worker that hangs, and one that is
    stuck in C runs no handler. Linux has this for it. Elsewhere a timer does, whose signal is not
    caught either, but which a user's function cancels that sets a timer of its own.
    """
    if sys.platform != "linux":
        return False
    asked = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    return asked


def _load(name: str) -> Judge:
    if name == "math_verify":
        from occ_jax.rewards.symbolic import math_verify

        return _without_record(math_verify)
    if ":" not in name:
        return _without_record(getattr(verifiers, name))
    return functools.partial(_of_user, name, user.load_function(name))


def _without_record(verifier: Callable[[str, str], Verdict]) -> Judge:
    return lambda completion, answer, _: verifier(completion, answer)


def _of_user(name: str, function: user.UserFunction, *arguments: Any) -> Verdict:
    return Verdict(user.call(name, function, *arguments), None)


def _judged(judges: dict[str, Judge], item: bytes) -> tuple[float, str | None, str | None]:
    """(score, given, None), or (0, None, what went wrong)."""
    try:
        name, *arguments = pickle.loads(item)
        score, given = judges[name](*arguments)
    except user.CallFailed as error:
        return 0.0, None, str(error)
    except BaseException as error:  # MemoryError and RecursionError among others
        return 0.0, None, f"a verifier raised {user.described(error)}"
    return score, given, None


def _limit(kind: int, most: int) -> None:
    _, ceiling = resource.getrlimit(kind)
    if ceiling != resource.RLIM_INFINITY:
        most = min(most, ceiling)
    resource.setrlimit(kind, (most, ceiling))


def _send(connection: socket.socket, message: Any) -> None:
    data = pickle.dumps(message)
    connection.sendall(LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> Any:
    """The next message, or None where there will be no more."""
    header = _read(connection, LENGTH.size)
    data = None if header is None else _read(connection, *LENGTH.unpack(header))
    return None if data is None else pickle.loads(data)


def _read(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 2**20))
        if not part:
            return None
        data += part
    return bytes(data)
