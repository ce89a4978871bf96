"""Processes that judge completions, kept apart from training so that none can hang or crash it.

The workers are fresh interpreters without JAX. Each judges one completion at a time under a
wall-clock deadline and a memory limit; one that exceeds the deadline is killed and replaced, one
that dies is replaced, and in both cases only the completion at hand is lost: it scores 0 and is
counted. All waiting is in one `select` with a time-out, and no write blocks.

Why no library: the pool of `pebble`, the nearest, asks a worker to end and waits 3 seconds before
it kills it, during which it serves no other; six hanging items of one second take two workers 21
seconds there and 3 here. It measures time by a clock that can be set, shares one pipe among the
workers, which hangs when one dies inside its lock, and as any `multiprocessing` pool it runs the
main script again in every worker.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from occ_jax.config import RewardConfig
from occ_jax.errors import UserError
from occ_jax.rewards.verifiers import CHARACTERS_READ
from occ_jax.rewards.worker import LENGTH

_MOST_WORKERS = 32
_SECONDS_TO_START = 60.0  # imports of SymPy, or of what a user's function needs
_FAILED_STARTS = 3  # in a row, after which something is wrong with the machine
_CHUNK_ITEMS, _CHUNK_BYTES = 64, 2**18

# The parent's sys.path, so that a worker finds the same code whatever started the parent; -P keeps
# the working directory off it until then.
_START = (
    "import json, sys; path, settings = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from occ_jax.rewards.worker import Settings, main; main(Settings(*settings))"
)
_PLURAL = {"timeout": "time-outs", "death": "deaths", "error": "errors"}
_HOW = {
    "timeout": "{} took longer than reward.deadline_s",
    "death": "the process of {} ended, or was killed for its memory",
}
_LOG = logging.getLogger("occ_jax.rewards")


class Item(NamedTuple):
    """A completion to be judged."""

    verifier: str
    completion: str
    answer: str
    record: Mapping[str, Any] = {}


class Judged(NamedTuple):
    """Verdicts on N items, in their order."""

    scores: np.ndarray  # float32 [N]
    given: list[str | None]  # normalised answers; None where there is none
    failures: list[str]  # "timeout", "death" or "error" where the verifier failed, else ""
    seconds: float  # that judging took
    asked: int  # of the N, those that verifiers were asked about; the others score 0 unseen


class VerifierPool:
    """Worker processes that live as long as a run; a context manager.

    Not for several threads at a time. Linux ends a worker with the thread that started it, so the
    thread that makes a pool should live as long.

    Example:
        >>> with VerifierPool(["exact_match"], RewardConfig(workers=1)) as pool:
        ...     pool.judge([Item("exact_match", given, "34") for given in ("34", "12")]).scores
        array([1., 0.], dtype=float32)
    """

    def __init__(self, verifiers: Sequence[str], config: RewardConfig) -> None:
        """Starts the workers and waits until they are ready.

        Args:
            verifiers: names of all that items will ask for.
            config: workers, deadline, memory limit.

        Raises:
            UserError: a function of the user cannot be imported, or no worker starts.
        """
        self._verifiers = tuple(dict.fromkeys(verifiers))
        self._config = config
        count = config.workers
        self._count = min(os.cpu_count() or 1, _MOST_WORKERS) if count is None else count
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        # Also where the pool is dropped, or the interpreter ends, without `close`.
        self._stop = weakref.finalize(self, _stop_all, self._selector, self._workers)
        try:
            self._refill()
            while not all(worker.ready for worker in self._workers):
                self._turn(collections.deque(), {})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers; none is left when it returns."""
        self._stop()

    def judge(self, items: Sequence[Item]) -> Judged:
        """Judges a batch; whatever the items are, it returns.

        The worst are items of which each takes a worker with it: every one costs a deadline and the
        start of a replacement (0.4 s with math-verify, what a user's function imports, a minute at
        most), items / workers times.

        Raises:
            UserError: a function of the user fails on every item it was asked for, by an error, its
                process's death or the deadline.
        """
        started = time.monotonic()
        waiting = collections.deque(range(len(items)))
        results: dict[int, _Result] = {}
        try:
            self._refill()
            for worker in [worker for worker in self._workers if worker.idle and worker.ended]:
                self._replace(worker, "death", waiting, results)  # between two batches: no blame
            while len(results) < len(items):
                for worker in self._workers:
                    if waiting and worker.idle:
                        worker.assign(_chunk(items, waiting, self._count), self._config.deadline_s)
                self._turn(waiting, results)
        except BaseException:
            _stop_all(self._selector, self._workers, for_good=False)
            raise
        seconds = time.monotonic() - started
        _report_failures(items, results)
        ordered = [results[index] for index in range(len(items))]
        return Judged(
            scores=np.array([result.score for result in ordered], np.float32),
            given=[result.given for result in ordered],
            failures=[result.failed for result in ordered],
            seconds=seconds,
            asked=len(items),
        )

    def _refill(self) -> None:
        if not self._stop.alive:
            raise ValueError("the pool is closed")
        while len(self._workers) < self._count:
            worker = _Worker(self._verifiers, self._config)
            self._workers.append(worker)
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _turn(self, waiting: collections.deque[int], results: dict[int, _Result]) -> None:
        """Waits for the next message or deadline and does what follows from it."""
        due = min((worker.due for worker in self._workers), default=math.inf)
        patience = max(0.0, due - time.monotonic())
        for worker in self._workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.sending else 0)
            self._selector.modify(worker.socket, events, worker)
        for key, _ in self._selector.select(patience):
            worker = key.data
            alive = worker.write()
            for message in worker.read():
                self._take(worker, message, results)
            if not alive or worker.closed:
                self._replace(worker, "death", waiting, results)
        # After reading: what has arrived in time counts, even if this process was held up.
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.due <= now]:
            self._replace(worker, "timeout", waiting, results)

    def _take(self, worker: _Worker, message: Any, results: dict[int, _Result]) -> None:
        if worker.ready:
            results[worker.tasks.popleft()] = _Result(*message)
            worker.restart_clock(self._config.deadline_s)
            return
        kind, text = message
        if kind == "refused":
            raise UserError(text)
        self._failed_starts = 0
        worker.become_ready()

    def _replace(
        self,
        worker: _Worker,
        failure: str,
        waiting: collections.deque[int],
        results: dict[int, _Result],
    ) -> None:
        """Ends a worker, blames the item it was at, and puts its others back in front."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.stop()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _FAILED_STARTS:
                how = "within a minute" if failure == "timeout" else "but end at once"
                raise UserError(f"verifier processes do not start {how}; their errors are above")
        if worker.tasks:
            results[worker.tasks.popleft()] = _Result(0.0, None, None, failure)
            waiting.extendleft(reversed(worker.tasks))
        self._refill()


class _Result(NamedTuple):
    score: float
    given: str | None
    error: str | None
    failure: str = ""

    @property
    def failed(self) -> str:
        """The kind of failure, empty where there is a verdict."""
        return self.failure or ("error" if self.error is not None else "")


class _Worker:
    """One process and the socket to it."""

    def __init__(self, verifiers: tuple[str, ...], config: RewardConfig) -> None:
        self.socket, theirs = socket.socketpair()
        memory = config.memory_mib * 2**20
        settings = (theirs.fileno(), os.getpid(), verifiers, config.deadline_s, memory)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps([sys.path, settings])],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a user's function prints is no result of the run
                env={"OMP_NUM_THREADS": "1", **os.environ, "JAX_PLATFORMS": "cpu"}
                # SymPy's paths through an expression depend on it: same verdicts in every worker.
                | {"PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C is the trainer's; a group is killed as one
            )
        self.socket.setblocking(False)
        self.ready = self.closed = False
        self.tasks: collections.deque[int] = collections.deque()
        self.due = time.monotonic() + _SECONDS_TO_START
        self._outgoing = memoryview(b"")
        self._incoming = bytearray()

    @property
    def idle(self) -> bool:
        return self.ready and not self.tasks

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def sending(self) -> bool:
        return len(self._outgoing) > 0

    def become_ready(self) -> None:
        self.ready, self.due = True, math.inf

    def assign(self, chunk: tuple[list[int], bytes], deadline: float) -> None:
        indices, message = chunk
        self.tasks.extend(indices)
        self._outgoing = memoryview(LENGTH.pack(len(message)) + message)
        self.due = time.monotonic() + deadline

    def restart_clock(self, deadline: float) -> None:
        self.due = time.monotonic() + deadline if self.tasks else math.inf

    def write(self) -> bool:
        """Sends what fits; False where nobody is there to read it."""
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def read(self) -> Iterator[Any]:
        """The messages that have arrived; sets `closed` at the end of them."""
        try:
            while part := self.socket.recv(2**16):
                self._incoming += part
            self.closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        while len(self._incoming) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._incoming)
            end = LENGTH.size + size
            if len(self._incoming) < end:
                return
            message = pickle.loads(bytes(self._incoming[LENGTH.size : end]))
            del self._incoming[:end]
            yield message

    def stop(self) -> None:
        """Kills the process, and what it started, and reaps it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self.socket.close()


def _stop_all(
    selector: selectors.BaseSelector, workers: list[_Worker], for_good: bool = True
) -> None:
    while workers:
        worker = workers.pop()
        selector.unregister(worker.socket)
        worker.stop()
    if for_good:
        selector.close()


def _chunk(
    items: Sequence[Item], waiting: collections.deque[int], workers: int
) -> tuple[list[int], bytes]:
    """Takes a worker's next items off `waiting`: many small ones or a single large one."""
    most = min(_CHUNK_ITEMS, max(1, len(waiting) // (4 * workers)))
    indices: list[int] = []
    packed: list[bytes] = []
    size = 0
    while waiting and len(indices) < most:
        item = items[waiting[0]]
        if ":" not in item.verifier:
            reads = CHARACTERS_READ.get(item.verifier, len(item.completion))
            item = item._replace(completion=item.completion[-reads:], record={})
        data = pickle.dumps(tuple(item))
        size += len(data)
        if indices and size > _CHUNK_BYTES:
            break
        indices.append(waiting.popleft())
        packed.append(data)
    return indices, pickle.dumps(packed)


def _report_failures(items: Sequence[Item], results: Mapping[int, _Result]) -> None:
    """A line a verifier about its failures; where a user's function does nothing else, the end."""
    asked: collections.Counter[str] = collections.Counter(item.verifier for item in items)
    failed: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if results[index].failed:
            failed.setdefault(item.verifier, []).append(index)
    for verifier, indices in failed.items():
        kinds = collections.Counter(results[index].failed for index in indices)
        first = items[indices[0]]
        where = f" on {first.record['id']}" if "id" in first.record else ""
        result = results[indices[0]]
        text = (result.error or _HOW[result.failure].format(verifier)) + where
        many = f"{len(indices)} of {asked[verifier]}"
        if ":" in verifier and len(indices) == asked[verifier]:
            raise UserError(f"no verdict of {many}: {text}" if len(indices) > 1 else text)
        told = ", ".join(f"{name} {kinds[kind]}" for kind, name in _PLURAL.items() if kinds[kind])
        _LOG.warning("%s verdicts failed (%s), the first: %s", many, told, text)


def reward_metrics(
    batches: Sequence[Judged], gather: Callable[[np.ndarray], np.ndarray] = lambda own: own
) -> dict[str, float]:
    """What the judging of some batches cost, and how often verifiers failed, under names to log.

    Args:
        batches: that this process has judged.
        gather: from this process's row of figures [1, 5] to those of all processes, which judge at
            the same time: of their seconds the most counts, of the rest the sum.
    """
    seconds = sum(judged.seconds for judged in batches)
    asked = sum(judged.asked for judged in batches)
    counts = collections.Counter(failure for judged in batches for failure in judged.failures)
    kinds = ("timeout", "death", "error")
    figures = gather(np.array([[seconds, asked, *(counts[kind] for kind in kinds)]]))
    seconds = float(figures[:, 0].max())
    items, timeouts, deaths, errors = figures[:, 1:].sum(axis=0).tolist()
    return {
        "timing_s/reward": seconds,
        "perf/reward_throughput": items / seconds if seconds > 0 else 0.0,  # items/s
        "reward/timeouts": timeouts,
        "reward/deaths": deaths,
        "reward/errors": errors,
    }
