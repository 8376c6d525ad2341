# SPDX-License-Identifier: Apache-2.0
"""Measure what this machine can do: memory bandwidth and float32 matrix peak, through XLA.

A CPU has no useful data sheet (shared hosts, turbo clocks, memory channels), so its roofline is
measured with the same compiler and threads that run the model: a STREAM-like in-place scale, a
matrix-vector product (what decoding does) and square products. Best of several runs, since a peak
is wanted. Takes about three seconds and 0.5 GB.
"""

import dataclasses
import datetime
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.run import processor_name
from sqzjax.analysis import Hardware, hardware_for
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable

_LOG = logging.getLogger(__name__)
_FILE = "machine.json"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Measured rates of one device (bytes/s, operations/s) and what they were measured on."""

    device_kind: str
    processor: str
    cores: int
    jax_version: str
    measured_at: str
    scale_bandwidth: float
    read_bandwidth: float
    matmul_flops: float

    @property
    def bandwidth(self) -> float:
        """Best rate seen, the ceiling to compare with."""
        return max(self.scale_bandwidth, self.read_bandwidth)

    @property
    def hardware(self) -> Hardware:
        """Record for `sqzjax.analysis.roofline`."""
        return Hardware(
            name=f"{self.device_kind} ({self.processor}, {self.cores} cores)",
            bandwidth=self.bandwidth,
            peak_flops=self.matmul_flops,
            source=f"measured {self.measured_at} with jax {self.jax_version}",
        )


def measure(*, megabytes: int = 256, matmul_size: int = 2048, repeats: int = 7) -> Machine:
    """Measure the default device with buffers of `megabytes` (more than the last-level cache)."""
    if megabytes < 1 or matmul_size < 1 or repeats < 1:
        raise ValueError(
            f"megabytes={megabytes}, matmul_size={matmul_size}, repeats={repeats} must be >= 1"
        )
    machine = Machine(
        device_kind=jax.devices()[0].device_kind,
        processor=processor_name(),
        cores=usable_cores(),
        jax_version=jax.__version__,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        scale_bandwidth=_scale(megabytes << 20, repeats),
        read_bandwidth=_read(megabytes << 20, repeats),
        matmul_flops=max(_matmul(size, repeats) for size in (matmul_size // 2 or 1, matmul_size)),
    )
    _LOG.info(
        "measured %.1f GB/s and %.1f GFLOP/s on %s",
        machine.bandwidth / 1e9,
        machine.matmul_flops / 1e9,
        machine.processor,
    )
    return machine


def load_or_measure(workdir: Path, *, refresh: bool = False) -> Machine:
    """Return the figures kept in `workdir`, measuring anew for another machine or jax version."""
    path = workdir / _FILE
    if path.is_file() and not refresh:
        kept = _read_json(path)
        here = (jax.devices()[0].device_kind, processor_name(), usable_cores(), jax.__version__)
        if kept and here == (kept.device_kind, kept.processor, kept.cores, kept.jax_version):
            return kept
    machine = measure()
    check_writable(workdir)
    atomic.write_text(path, json.dumps(dataclasses.asdict(machine), indent=2) + "\n")
    return machine


def hardware_here(workdir: Path, *, refresh: bool = False) -> Hardware:
    """Return the data-sheet record of this device, or the measured one where there is none."""
    try:
        return hardware_for(jax.devices()[0].device_kind)
    except ValueError:
        return load_or_measure(workdir, refresh=refresh).hardware


def _read_json(path: Path) -> Machine | None:
    try:
        return Machine(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        _LOG.warning("%s is unreadable or of another version; measuring again", path)
        return None


def seconds_of(run: Callable[[], Any], repeats: int) -> tuple[float, ...]:
    """Return wall times of `repeats` runs after one that is not counted."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return tuple(times)


def _scale(size: int, repeats: int) -> float:
    """Read and write one buffer in place; a fresh output would measure page faults."""
    scale = jax.jit(lambda x: x * 0.5, donate_argnums=0)
    held = [jnp.ones(size // 4, jnp.float32)]

    def run() -> jax.Array:
        held[0] = scale(held[0])
        return held[0]

    return 2 * size / min(seconds_of(run, repeats))


def _read(size: int, repeats: int) -> float:
    width = 1024
    matrix = jnp.ones((max(1, size // (4 * width)), width), jnp.float32)
    vector = jnp.ones(width, jnp.float32)
    product = jax.jit(jnp.dot)
    return matrix.nbytes / min(seconds_of(lambda: product(matrix, vector), repeats))


def _matmul(size: int, repeats: int) -> float:
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    return 2 * size**3 / min(seconds_of(lambda: product(x, x), repeats))


def usable_cores() -> int:
    """Return the cores this process may use: in a container, fewer than the machine has."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
