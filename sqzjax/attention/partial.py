# SPDX-License-Identifier: Apache-2.0
"""Partial attention and its one merge, which the kernels share; see `pallas_kernels.partials`."""

from pallas_kernels.partials import Partial, merge

__all__ = ["Partial", "merge"]
