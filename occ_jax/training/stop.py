"""Requests to stop a run: SIGTERM and Ctrl-C end it after the step that is under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@contextmanager
def stop_requests() -> Generator[Callable[[int], bool]]:
    """Yields a function that says, after a step, whether the run has to stop.

    SIGTERM and the first SIGINT ask for it instead of ending the process; a second SIGINT
    interrupts. With several processes JAX's preemption service takes SIGTERM and makes all of them
    stop after the same step, whichever got it; a SIGINT is passed on to that service. Outside the
    main thread (a notebook's worker, a test) signals stay as they are.
    """
    single = jax.process_count() == 1
    received: list[int] = []

    def remember(number: int, _: object) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        if not single:
            os.kill(os.getpid(), signal.SIGTERM)

    def must_stop(step: int) -> bool:
        return bool(received) if single else multihost_utils.reached_preemption_sync_point(step)

    try:
        handled = (signal.SIGTERM, signal.SIGINT) if single else (signal.SIGINT,)
        previous = {s: signal.signal(s, remember) for s in handled}
    except ValueError:
        yield must_stop
        return
    try:
        yield must_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
