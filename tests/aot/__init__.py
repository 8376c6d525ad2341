# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for accelerators that are not there, and check what the compilers made of them.

A module of cases defines `aot_cases()` returning a list of `Case`; those of the kernels are the
files `tests/pallas_kernels/aot_*.py`. `python -m tests.aot --help` says how to run them. It catches
what interpretation on a CPU cannot: layouts and block shapes that a compiler refuses, spills,
operands that XLA copies, loops too long to reach the memory bandwidth.
"""

from tests.aot.cases import Case, Kernel, Record

__all__ = ["Case", "Kernel", "Record"]
