# SPDX-License-Identifier: Apache-2.0
"""Measure the kernels against their baselines and against a copy of memory, in one process.

An operation registers its shapes in its own `bench.py` as `cases() -> list[BenchCase]`;
`python -m pallas_kernels.bench` finds and measures them all. It needs jax alone, goes on where an
interrupted run stopped, and keeps to a time budget, so it can be run on a borrowed device.
"""

from pallas_kernels.bench.case import BenchCase, Foreign, torch_candidate

__all__ = ["BenchCase", "Foreign", "torch_candidate"]
