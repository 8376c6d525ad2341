# SPDX-License-Identifier: Apache-2.0
"""Accelerator kernels; imports jax and numpy only. Every operation runs through XLA so far."""
