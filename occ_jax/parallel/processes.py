"""Several processes as one run: how they start, and how one that dies ends the others.

JAX's coordination service (jax 0.10 to 0.12) tells a process that another has died by abort(),
in C++ and with a stack trace, from a thread that Python cannot reach. So such a run is watched
twice. A thread of every process hears the others' heartbeats and ends its own with one line when
one falls silent or says that it gives up. Where the coordinator itself has gone the service is
quicker; then the line comes from a parent that the process was forked from, which has nothing else
to do than to say it, and to hold the stack trace back.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from occ_jax.errors import UserError, one_line

_ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FLAG = "--distributed."
_AGAIN = "start all processes again to go on from the last checkpoint"
_ANOTHER_ENDED = 3  # exit status
_BEAT_S = 1.0
_GRACE_S = 30.0  # by which JAX's own detection, the rougher one, comes later
_SUSPICIOUS_S = 5.0  # silence that is enough after a collective has failed
_LINGER_S = 5.0
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
# What the coordination service logs before it aborts the process.
_LAST_LINES = ("coordination_service", "Terminating process because the JAX distributed service")

_last_words = mmap.mmap(-1, 1024)  # shared with the parent: what an abort would mean


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
    """Seconds of silence after which a process is taken for dead."""


def requested(arguments: Sequence[str]) -> bool:
    """Whether the command line or the environment asks for several processes."""
    return in_environment() or any(argument.startswith(FLAG) for argument in arguments)


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
    """Flags, completed by the environment and checked.

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


def supervise(run: Callable[[], int]) -> int:
    """Runs `run` in a child process; returns its exit status.

    Call it before anything starts threads. The child dies with its parent, and gets its signals.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _become_child(write)
        status = 1
        try:
            status = run()
        except SystemExit as stop:  # of --help
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)  # past JAX's exit handler, which waits for processes that may be gone
    os.close(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    held: list[bytes] = []
    pump = threading.Thread(target=_forward, args=(read, held), daemon=True)
    pump.start()
    _, waited = os.waitpid(child, 0)
    pump.join(1.0)  # what the child has started may keep its end open
    status = os.waitstatus_to_exitcode(waited)
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
    words = bytes(_last_words).rstrip(b"\0").decode()
    if status == -signal.SIGABRT and words and held:
        print(f"error: {words}", file=sys.stderr)
        return _ANOTHER_ENDED
    sys.stderr.buffer.write(b"".join(held))
    return status if status >= 0 else 128 - status


def _become_child(write: int) -> None:
    os.setpgid(0, 0)  # signals of the terminal come from the parent, once
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Python keeps the terminal; what C++ writes goes past the parent.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(write, 2)
    os.close(write)


def _forward(read: int, held: list[bytes]) -> None:
    """Passes lines on; from the first that announces an abort on they are held."""
    with os.fdopen(read, "rb") as lines:
        for line in lines:
            if held or any(text.encode() in line for text in _LAST_LINES):
                held.append(line)
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()


@contextmanager
def joined(options: Distributed) -> Generator[None]:
    """Connects the processes, and watches them until the block ends.

    Raises:
        UserError: the coordinator cannot be reached, or no cluster was found.
    """
    import jax

    _start(options)
    watch = _Watch(options.heartbeat_timeout)
    try:
        yield
    except BaseException as error:
        if _of_a_collective(error):
            watch.blame()
        watch.leave(one_line(error) if isinstance(error, Exception) else type(error).__name__)
        raise
    watch.finish()
    _mean("the other processes did not end")
    jax.distributed.shutdown()


def _of_a_collective(error: BaseException | None) -> bool:
    """Whether an error may be another process's: JAX's runtime raised it, or what it led to."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _start(options: Distributed) -> None:
    import jax

    # Of the processes that JAX counts, those on CPUs speak by gloo.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    seconds, address = options.initialization_timeout, options.coordinator
    if options.process_id:
        assert address is not None
        _await_coordinator(address, seconds)
    who = "processes" if options.num_processes is None else f"{options.num_processes} processes"
    where = "the coordinator" if address is None else f"the coordinator {address}"
    _mean(
        f"not all {who} have met at {where} within {seconds} s ({FLAG}initialization-timeout); "
        "every one must be given the same coordinator and number of processes, and an id of its own"
    )
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=options.num_processes,
            process_id=options.process_id,
            initialization_timeout=seconds,
            # JAX takes silence of half as long for death already.
            heartbeat_timeout_seconds=2 * (options.heartbeat_timeout + int(_GRACE_S)),
            # With an address there is nothing to be found out, and no host to be asked.
            cluster_detection_method="deactivate" if address else None,
        )
    except ValueError as error:
        raise UserError(
            f"{FLAG}auto finds no cluster ({one_line(error)}); give {FLAG}coordinator, "
            f"{FLAG}num-processes and {FLAG}process-id"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"process 0 cannot listen on {address}: {one_line(error)}") from error
    _mean(f"process 0, the coordinator, has gone; {_AGAIN}")


def _await_coordinator(address: str, seconds: float) -> None:
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


def _mean(words: str) -> None:
    """What the parent is to say should this process be aborted from now on."""
    _last_words[:] = words.encode()[: len(_last_words)].ljust(len(_last_words), b"\0")


class _Watch:
    """Heartbeats in the coordination service's store: [count, state, words] of every process."""

    def __init__(self, timeout: float) -> None:
        from jax._src import distributed  # the store has no public name

        state: Any = distributed.global_state
        self._client, self._me = state.client, state.process_id
        self._others = [i for i in range(state.num_processes) if i != self._me]
        self._timeout = timeout
        self._count, self._state, self._words = 0, "running", ""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch processes", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """This process is done; returns when the others are."""
        self._say("done")
        self._wake.set()
        self._thread.join()

    def leave(self, words: str) -> None:
        """This process ends early; the coordinator's waits until the others know."""
        with contextlib.suppress(Exception):
            self._say("left", words)
            until = time.monotonic() + _LINGER_S
            while self._me == 0 and time.monotonic() < until:
                states = self._read()
                if all(states.get(i, (0, "left"))[1] != "running" for i in self._others):
                    return
                time.sleep(0.1)

    def blame(self) -> None:
        """After a collective has failed: ends this process when it is found whose fault it was."""
        self._timeout = min(self._timeout, _SUSPICIOUS_S)
        time.sleep(self._timeout + 3 * _BEAT_S)

    def _say(self, state: str, words: str = "") -> None:
        with self._lock:
            self._state, self._words = state, words
        self._beat()

    def _beat(self) -> None:
        with self._lock:
            self._count += 1
            value = json.dumps([self._count, self._state, self._words])
            self._client.key_value_set(f"occ_jax/{self._me}", value, allow_overwrite=True)

    def _read(self) -> dict[int, Any]:
        found = self._client.key_value_dir_get("occ_jax")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}

    def _run(self) -> None:
        while self._state != "left":
            try:
                self._beat()
                states = self._read()
            except Exception:  # the coordinator does not answer; the parent says so
                states = {0: [0, "left", "the coordinator does not answer"]}
            now, others_done = time.monotonic(), True
            for other in self._others:
                value = states.get(other)
                if other not in self._seen or self._seen[other][0] != value:
                    self._seen[other] = (value, now)
                silent = now - self._seen[other][1]
                if self._state == "left" or (value is not None and value[1] == "done"):
                    continue
                others_done = False
                if value is not None and value[1] == "left":
                    self._end(f"process {other} has ended ({value[2]}); {_AGAIN}")
                if silent > self._timeout:
                    self._end(f"process {other} has not been heard of for {silent:.0f} s; {_AGAIN}")
            if self._state == "done" and others_done:
                return
            self._wake.wait(_BEAT_S)
            self._wake.clear()

    def _end(self, words: str) -> NoReturn:
        with contextlib.suppress(Exception):
            self._say("left", words)
        print(f"error: {words}", file=sys.stderr, flush=True)
        os._exit(_ANOTHER_ENDED)
