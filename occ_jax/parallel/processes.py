"""Connects several processes to one run, and ends each of them when another one has ended.

Owns how a process finds the others (flags, environment variables, JAX's detection of a cluster) and
how it ends. Heartbeats are those of JAX: a process in which a collective fails prints one line; one
that waits elsewhere is aborted by JAX, with JAX's message. `exchange.py` moves data between the
processes.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from occ_jax.errors import UserError, one_line, report

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAG = "--distributed."
# JAX's own time-out is later than ours, as it aborts the process without saying who is missing.
_GRACE_S = 30
_LINGER_S = 5.0
# How an error of a collective begins, or what it names, when another process has ended.
_DISCONNECTED = ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")
_COLLECTIVES = ("Gloo", "NCCL")


class OtherProcessEnded(UserError):
    """This run cannot continue, because another process has ended or never came."""

    exit_status = 3


@dataclass(frozen=True)
class Distributed:
    """How this process finds the others."""

    coordinator: str | None
    """host:port that process 0 listens on; None leaves all three to JAX's cluster detection."""
    num_processes: int | None
    process_id: int | None
    initialization_timeout: int
    """Seconds in which all processes must have started."""
    heartbeat_timeout: int
    """Seconds without a heartbeat after which a process counts as dead."""


def in_environment() -> bool:
    """Whether the environment names a coordinator, a number of processes or one of them."""
    return any(name in os.environ for name in _ENVIRONMENT)


def read_options(
    *,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    auto: bool | None,
    initialization_timeout: int | None,
    heartbeat_timeout: int | None,
) -> Distributed:
    """Completes the flags from the environment and checks them.

    Raises:
        UserError: some of the three are missing, or contradict each other.
    """
    initialization_timeout = initialization_timeout or 120
    heartbeat_timeout = heartbeat_timeout or 60
    if auto and coordinator is None:
        return Distributed(None, None, None, initialization_timeout, heartbeat_timeout)
    values: dict[str, Any] = {
        "coordinator": coordinator,
        "num-processes": num_processes,
        "process-id": process_id,
    }
    for (name, value), variable in zip(values.items(), _ENVIRONMENT, strict=True):
        if value is None and variable in os.environ:
            text = os.environ[variable]
            if name != "coordinator" and not text.isdigit():
                raise UserError(f"{variable} is {text!r}; it must be a whole number")
            values[name] = text if name == "coordinator" else int(text)
        if values[name] is None:
            raise UserError(f"{FLAG}{name}, or {variable}, is missing")
    address, count, number = values.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{FLAG}coordinator is {address!r}; it must be host:port")
    if not 0 <= number < count:
        raise UserError(f"{FLAG}process-id is {number}; it must be between 0 and {count - 1}")
    return Distributed(address, count, number, initialization_timeout, heartbeat_timeout)


@contextmanager
def joined(options: Distributed) -> Generator[None]:
    """Connects the processes; an error inside the block is reported and ends this process.

    Raises:
        UserError: the coordinator cannot be reached, or no cluster was found.
    """
    import jax

    _start(options)
    # Less than JAX takes to notice a dead process, so that no abort follows the line.
    linger = min(_LINGER_S, options.heartbeat_timeout / 2) if jax.process_index() == 0 else 0.0
    try:
        yield
    except BaseException as error:
        _end(_as_other_process_ended(error) or error, linger)
    jax.distributed.shutdown()


def _start(options: Distributed) -> None:
    import jax

    # Collectives between CPUs; no other platform reads it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds, address = options.initialization_timeout, options.coordinator
    if options.process_id:
        assert address is not None
        _await_coordinator(address, seconds)
    who = "processes" if options.num_processes is None else f"{options.num_processes} processes"
    where = "the coordinator" if address is None else f"the coordinator {address}"
    missing = OtherProcessEnded(
        f"not all {who} have met at {where} within {seconds} s ({FLAG}initialization-timeout); "
        "every one must be given the same coordinator and number of processes, and an id of its own"
    )
    timer = threading.Timer(seconds, _end, [missing])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            initialization_timeout=seconds + _GRACE_S,
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            # With an address there is nothing to detect, and no metadata server to ask.
            cluster_detection_method="deactivate" if address else None,
        )
    except ValueError as error:
        raise UserError(
            f"{FLAG}auto finds no cluster ({one_line(error)}); give {FLAG}coordinator, "
            f"{FLAG}num-processes and {FLAG}process-id"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"process 0 cannot listen on {address}: {one_line(error)}") from error
    finally:
        timer.cancel()


def _await_coordinator(address: str, seconds: float) -> None:
    """Waits until the coordinator listens, because JAX aborts when it does not.

    Raises:
        UserError: it does not listen within `seconds`, or its host is unknown.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
                return
        except OSError as error:
            unknown = isinstance(error, socket.gaierror)
            if unknown or time.monotonic() > deadline:
                raise UserError(
                    f"the coordinator {address} cannot be reached"
                    f"{'' if unknown else f' within {seconds:g} s'}: "
                    f"{error.strerror or one_line(error)}"
                ) from error
        time.sleep(0.2)


def _as_other_process_ended(error: BaseException) -> OtherProcessEnded | None:
    """The line for an error that a failed collective raised or led to; None for other errors."""
    import jax

    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        disconnected = isinstance(cause, jax.errors.JaxRuntimeError) and text.startswith(
            _DISCONNECTED
        )
        if disconnected or any(name in text for name in _COLLECTIVES):
            return OtherProcessEnded(
                f"another process has ended ({one_line(cause)}); start all processes again to go "
                "on from the last checkpoint"
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _end(error: BaseException, linger: float = 0.0) -> NoReturn:
    """Reports the error and ends this process without JAX's exit handler.

    That handler waits for all processes, five minutes by default, and then aborts those that are
    left. Without it the connections close at once, so that collectives of the others fail.

    Args:
        error: becomes the line, or the traceback, and the exit status.
        linger: seconds in which other processes can report the same error. Process 0 runs the
            coordination service: JAX aborts the others when it ends.
    """
    status = 1
    try:  # the terminal or pipe that it writes to may be gone
        status = report(error)
        sys.stdout.flush()
        time.sleep(linger)
    finally:
        os._exit(status)
