# SPDX-License-Identifier: Apache-2.0
"""Analytical cost models: what a forward pass costs, and the least time it can take.

Pure Python, nothing here imports jax; `sqzjax.analysis.jaxpr` (operation counts of any jitted
function) does and is imported by its own name.
"""

from sqzjax.analysis.devices import DEVICES, Hardware, hardware_for
from sqzjax.analysis.operators import Operator, operators
from sqzjax.analysis.roofline import (
    Footprint,
    OperatorTime,
    Roofline,
    decode_bytes,
    footprint,
    roofline,
    training_flops,
)
from sqzjax.analysis.workload import Precision, Workload

__all__ = [
    "DEVICES",
    "Footprint",
    "Hardware",
    "Operator",
    "OperatorTime",
    "Precision",
    "Roofline",
    "Workload",
    "decode_bytes",
    "footprint",
    "hardware_for",
    "operators",
    "roofline",
    "training_flops",
]
