"""A pool of processes that judge completions, so that no completion can hang or crash training.

The workers are fresh interpreters without JAX. Each judges one completion at a time under a
wall-clock deadline and a memory limit. A worker that exceeds the deadline is killed and replaced, a
worker that dies is replaced, and in both cases only the completion at hand is lost: it scores 0 and
is counted. The pool waits in one `select` with a time-out, and no write blocks. Leaves the worker's
side of the protocol to `occ_jax.rewards.worker`.

No library is used. `pebble`, the nearest, requests a worker to end and waits 3 seconds before it
kills it, and serves no other worker meanwhile: six hanging items with a deadline of one second take
its two workers 21 seconds, and ours 3. It measures time by a clock that can be set, and shares one
pipe among the workers, which hangs when one dies inside its lock. As any `multiprocessing` pool, it
runs the main script again in every worker.
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

_MAX_WORKERS = 32
_START_SECONDS = 60.0  # for imports: SymPy, or the libraries of a user's function
_MAX_FAILED_STARTS = 3  # in a row; then the pool gives up
_CHUNK_ITEMS, _CHUNK_BYTES = 64, 2**18

# A worker gets the parent's sys.path, so that it imports the same code however the parent was
# started; -P keeps the working directory off the path until then.
_START = (
    "import json, sys; path, settings = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from occ_jax.rewards.worker import Settings, main; main(Settings(*settings))"
)
_PLURAL = {"timeout": "time-outs", "death": "deaths", "error": "errors"}
_CAUSES = {
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
    given: list[str | None]  # normalised answers; None if there is none
    failures: list[str]  # "timeout", "death" or "error" if the verifier failed, else ""
    seconds: float  # that judging took
    num_judged: int  # items that a verifier judged; the other of the N score 0 without one


class VerifierPool:
    """Worker processes that live as long as a run; a context manager.

    Only one thread may use a pool at a time. Linux ends a worker together with the thread that
    started it, so the thread that makes a pool should live as long as the pool.

    Example:
        >>> with VerifierPool(["exact_match"], RewardConfig(workers=1)) as pool:
        ...     pool.judge([Item("exact_match", given, "34") for given in ("34", "12")]).scores
        array([1., 0.], dtype=float32)
    """

    def __init__(self, verifiers: Sequence[str], config: RewardConfig) -> None:
        """Starts the workers and waits until they are ready; `verifiers` are those of all items.

        Raises:
            UserError: a user's function cannot be imported, or no worker starts.
        """
        self._verifiers, self._config = tuple(dict.fromkeys(verifiers)), config
        count = config.workers
        self._count = min(os.cpu_count() or 1, _MAX_WORKERS) if count is None else count
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        # Runs also if the pool is garbage-collected, or the interpreter ends, without `close`.
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
        """Kills all workers and waits until they have ended."""
        self._stop()

    def judge(self, items: Sequence[Item]) -> Judged:
        """Judges a batch; it returns for any items.

        In the worst case every item ends its worker. Then each worker needs, for each of its items,
        a deadline and the start of a replacement: 0.4 s with math-verify, the imports of a user's
        function, a minute at most.

        Raises:
            UserError: a user's function fails on every item that it judges, by an error, the death
                of its process or the deadline.
        """
        started = time.monotonic()
        waiting = collections.deque(range(len(items)))
        results: dict[int, _Result] = {}
        try:
            self._refill()
            for worker in [worker for worker in self._workers if worker.idle and worker.ended]:
                self._replace(worker, "death", waiting, results)  # it has no items
            while len(results) < len(items):
                for worker in self._workers:
                    if waiting and worker.idle:
                        worker.assign(*_chunk(items, waiting, self._count))
                self._turn(waiting, results)
        except BaseException:
            _stop_all(self._selector, self._workers, close_selector=False)
            raise
        seconds = time.monotonic() - started
        ordered = [results[index] for index in range(len(items))]
        _report_failures(items, ordered)
        scores = np.array([result.score for result in ordered], np.float32)
        given, failures = [r.given for r in ordered], [r.failure for r in ordered]
        return Judged(scores, given, failures, seconds, num_judged=len(items))

    def _refill(self) -> None:
        if not self._stop.alive:
            raise ValueError("the pool is closed")
        while len(self._workers) < self._count:
            worker = _Worker(self._verifiers, self._config)
            self._workers.append(worker)
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _turn(self, waiting: collections.deque[int], results: dict[int, _Result]) -> None:
        """Waits for the next message or deadline and handles it."""
        due = min((worker.due for worker in self._workers), default=math.inf)
        timeout = max(0.0, due - time.monotonic())
        for worker in self._workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.sending else 0)
            self._selector.modify(worker.socket, events, worker)
        for key, _ in self._selector.select(timeout):
            worker = key.data
            alive = worker.write()
            for message in worker.read():
                self._take(worker, message, results)
            if not alive or worker.closed:
                self._replace(worker, "death", waiting, results)
        # After reading, as verdicts that arrived in time count even if this process was delayed.
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.due <= now]:
            self._replace(worker, "timeout", waiting, results)

    def _take(self, worker: _Worker, message: Any, results: dict[int, _Result]) -> None:
        if worker.ready:
            score, given, error = message
            failure = "" if error is None else "error"
            results[worker.tasks.popleft()] = _Result(score, given, error, failure)
            worker.restart_clock()
            return
        kind, text = message
        if kind == "refused":
            raise UserError(text)
        self._failed_starts = 0
        worker.ready, worker.due = True, math.inf

    def _replace(
        self,
        worker: _Worker,
        failure: str,
        waiting: collections.deque[int],
        results: dict[int, _Result],
    ) -> None:
        """Replaces a worker: its current item fails, its other items return to the front."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        worker.stop()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                cause = "within a minute" if failure == "timeout" else "but end at once"
                raise UserError(f"verifier processes do not start {cause}; their errors are above")
        if worker.tasks:
            results[worker.tasks.popleft()] = _Result(0.0, None, None, failure)
            waiting.extendleft(reversed(worker.tasks))
        self._refill()


class _Result(NamedTuple):
    score: float
    given: str | None
    error: str | None
    failure: str  # as in `Judged`


class _Worker:
    """One process and the socket to it."""

    def __init__(self, verifiers: tuple[str, ...], config: RewardConfig) -> None:
        self.socket, worker_end = socket.socketpair()
        memory = config.memory_mib * 2**20
        settings = (worker_end.fileno(), os.getpid(), verifiers, config.deadline_s, memory)
        with worker_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps([sys.path, settings])],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # prints of a user's function are no output of the run
                env={"OMP_NUM_THREADS": "1", **os.environ, "JAX_PLATFORMS": "cpu"}
                # The order in which SymPy simplifies depends on it: same verdicts in all workers.
                | {"PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C is the trainer's; a group is killed as one
            )
        self.socket.setblocking(False)
        self._deadline = config.deadline_s
        self.ready = self.closed = False
        self.tasks: collections.deque[int] = collections.deque()
        self.due = time.monotonic() + _START_SECONDS
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

    def assign(self, indices: list[int], message: bytes) -> None:
        self.tasks.extend(indices)
        self._outgoing = memoryview(LENGTH.pack(len(message)) + message)
        self.restart_clock()

    def restart_clock(self) -> None:
        self.due = time.monotonic() + self._deadline if self.tasks else math.inf

    def write(self) -> bool:
        """Sends as much as the socket takes; False if the worker has closed its end."""
        try:
            while self._outgoing:
                self._outgoing = self._outgoing[self.socket.send(self._outgoing) :]
        except OSError as error:
            return isinstance(error, BlockingIOError)
        return True

    def read(self) -> Iterator[Any]:
        """Yields the messages that have arrived; sets `closed` if no more can come."""
        try:
            while part := self.socket.recv(2**16):
                self._incoming += part
            self.closed = True
        except OSError as error:
            self.closed = not isinstance(error, BlockingIOError)
        while len(self._incoming) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._incoming)[0]
            if len(self._incoming) < end:
                return
            message = pickle.loads(bytes(self._incoming[LENGTH.size : end]))
            del self._incoming[:end]
            yield message

    def stop(self) -> None:
        """Kills the process and its children, and reaps it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self.socket.close()


def _stop_all(
    selector: selectors.BaseSelector, workers: list[_Worker], close_selector: bool = True
) -> None:
    while workers:
        worker = workers.pop()
        selector.unregister(worker.socket)
        worker.stop()
    if close_selector:
        selector.close()


def _chunk(
    items: Sequence[Item], waiting: collections.deque[int], workers: int
) -> tuple[list[int], bytes]:
    """Takes a worker's next items off `waiting`: many small items or one large item."""
    max_items = min(_CHUNK_ITEMS, max(1, len(waiting) // (4 * workers)))
    indices: list[int] = []
    packed: list[bytes] = []
    size = 0
    while waiting and len(indices) < max_items:
        item = items[waiting[0]]
        if ":" not in item.verifier:
            read = CHARACTERS_READ.get(item.verifier, len(item.completion))
            item = item._replace(completion=item.completion[-read:], record={})
        data = pickle.dumps(tuple(item))
        size += len(data)
        if indices and size > _CHUNK_BYTES:
            break
        indices.append(waiting.popleft())
        packed.append(data)
    return indices, pickle.dumps(packed)


def _report_failures(items: Sequence[Item], results: Sequence[_Result]) -> None:
    """Logs one line about each verifier's failures.

    Raises:
        UserError: a user's function failed on all its items.
    """
    counts = collections.Counter(item.verifier for item in items)
    failed: dict[str, list[tuple[Item, _Result]]] = {}
    for item, result in zip(items, results, strict=True):
        if result.failure:
            failed.setdefault(item.verifier, []).append((item, result))
    for verifier, failures in failed.items():
        kinds = collections.Counter(result.failure for _, result in failures)
        item, result = failures[0]
        problem = f" on {item.record['id']}" if "id" in item.record else ""
        text = (result.error or _CAUSES[result.failure].format(verifier)) + problem
        share = f"{len(failures)} of {counts[verifier]}"
        if ":" in verifier and len(failures) == counts[verifier]:
            raise UserError(f"no verdict of {share}: {text}" if len(failures) > 1 else text)
        listed = ", ".join(f"{name} {kinds[kind]}" for kind, name in _PLURAL.items() if kinds[kind])
        _LOG.warning("%s verdicts failed (%s), the first: %s", share, listed, text)


def reward_metrics(
    batches: Sequence[Judged], gather: Callable[[np.ndarray], np.ndarray] = lambda own: own
) -> dict[str, float]:
    """Metrics of judging some batches: time, throughput and failures of verifiers.

    `gather` maps this process's row of figures [1, 5] to the rows of all processes. They judge at
    the same time, so the metrics are the maximum of seconds and the sums of the rest.
    """
    seconds = sum(judged.seconds for judged in batches)
    num_judged = sum(judged.num_judged for judged in batches)
    counts = collections.Counter(failure for judged in batches for failure in judged.failures)
    figures = gather(np.array([[seconds, num_judged, *(counts[kind] for kind in _PLURAL)]]))
    seconds = float(figures[:, 0].max())
    items, timeouts, deaths, errors = figures[:, 1:].sum(axis=0).tolist()
    return {
        "timing_s/reward": seconds,
        "perf/reward_throughput": items / seconds if seconds > 0 else 0.0,  # items/s
        "reward/timeouts": timeouts,
        "reward/deaths": deaths,
        "reward/errors": errors,
    }
