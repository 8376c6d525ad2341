# SPDX-License-Identifier: Apache-2.0
"""Accelerator kernels: one function per operation, which picks its backend by itself.

Imports jax and numpy only, so that another project can use it alone.
"""
