# SPDX-License-Identifier: Apache-2.0
"""Throughput of the steps between two lines of metrics; evaluation and saving do not count."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqzjax.analysis import hardware_for


class Speed:
    """A stopwatch with pauses. `session` gives model, batch shape and devices."""

    def __init__(self, session: Any):
        config = session.config
        family = session.family
        self._name = f"throughput/{family.unit}_per_second"
        self._units = family.units_per_step(config)
        self._flops = family.step_flops(config, session.model.config)
        devices = session.mesh.devices.flatten()
        self._device = devices[0]
        self._peak = config.log.peak_flops or _peak(self._device.device_kind, len(devices))
        self.start()

    def start(self) -> None:
        """Begin a window."""
        self._began, self._steps = time.perf_counter(), 0
        self._paused = self._loaded = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of a block."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count the time of a block as waiting for data."""
        began = time.perf_counter()
        yield
        self._loaded += time.perf_counter() - began

    def count(self) -> None:
        """Count a finished step."""
        self._steps += 1

    def close(self) -> dict[str, float]:
        """Return the metrics of the window and begin the next."""
        seconds = max(1e-9, time.perf_counter() - self._began - self._paused)
        rate = self._steps / seconds
        metrics = {
            "time": time.time(),
            self._name: rate * self._units,
            "throughput/loading_time": self._loaded / max(1, self._steps),
            "memory/peak_bytes": float(_peak_bytes(self._device)),
        }
        if self._peak:
            metrics["throughput/mfu"] = rate * self._flops / self._peak
        self.start()
        return metrics


def _peak(device_kind: str, count: int) -> float | None:
    try:
        return count * float(hardware_for(device_kind).peak_flops)
    except ValueError:
        return None  # a CPU, or an unknown accelerator: no figure is better than a wrong one


def _peak_bytes(device: Any) -> int:
    """Return the device's peak memory; the process's where the device does not tell (CPU)."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
