# SPDX-License-Identifier: Apache-2.0
"""Prepare batches in a thread while the device computes."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self


class Prefetcher:
    """Iterate over (step, batch) for steps from `start` to `stop` (None: without end).

    An error in the thread is raised where the batch is asked for, after the batches before it.
    Use it as a context manager, or call `close`: the thread otherwise waits forever.
    """

    def __init__(
        self, batch: Callable[[int], Any], start: int, stop: int | None = None, depth: int = 2
    ):
        if depth < 1:
            raise ValueError(f"depth={depth} must be >= 1")
        self._batch = batch
        self._queue: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._next, self._stop = start, stop
        self._thread = threading.Thread(
            target=self._work, args=(start, stop), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        if self._closed.is_set() or (self._stop is not None and self._next >= self._stop):
            self.close()
            raise StopIteration
        step, batch, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        self._next = step + 1
        return step, batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread; harmless when repeated."""
        self._closed.set()
        while self._thread.is_alive():
            # A full queue would keep the thread from noticing.
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _work(self, step: int, stop: int | None) -> None:
        while not self._closed.is_set() and (stop is None or step < stop):
            try:
                item = (step, self._batch(step), None)
            except Exception as error:  # carried to the consumer
                item = (step, None, error)
            self._queue.put(item)
            if item[2] is not None:
                return
            step += 1
