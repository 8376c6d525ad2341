# SPDX-License-Identifier: Apache-2.0
"""Every quantizer with settings under which it must pass the contract, in rising bits."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sqzjax.quant import Codebook, Float8, NormalFloat, Quantizer, Uniform

HEADS, ROWS, WIDTH = 2, 24, 32
_CHANNELS = (HEADS, 1, WIDTH)
RANGES = {"scale": np.full(_CHANNELS, 4.5, np.float32), "offset": np.zeros(_CHANNELS, np.float32)}


@dataclass(frozen=True)
class QuantizerCase:
    """A family: the same settings at each of `bits`; `fitted` is what a calibration would give."""

    name: str
    make: Any  # bits -> Quantizer
    bits: tuple[int, ...] = (2, 3, 4)
    fitted: Any = None

    @property
    def quantizer(self) -> Quantizer:
        """Return the family's finest member."""
        return self.make(self.bits[-1])


CASES = (
    QuantizerCase("uniform", lambda b: Uniform(bits=b), (2, 3, 4, 6, 8)),
    QuantizerCase("uniform_groups", lambda b: Uniform(bits=b, group_size=8), (2, 3, 4, 6, 8)),
    QuantizerCase("uniform_channel", lambda b: Uniform(bits=b, axis="channel", group_size=8)),
    QuantizerCase("symmetric", lambda b: Uniform(bits=b, symmetric=True), (2, 3, 4, 8)),
    QuantizerCase("normal_float", lambda b: NormalFloat(bits=b), (2, 3, 4, 6)),
    QuantizerCase("normal_float_groups", lambda b: NormalFloat(bits=b, group_size=16)),
    QuantizerCase(
        "normal_float_channel", lambda b: NormalFloat(bits=b, axis="channel", group_size=8)
    ),
    QuantizerCase("float8_e4m3", lambda b: Float8(), (8,)),
    QuantizerCase("float8_e5m2", lambda b: Float8(format="e5m2"), (8,)),
    QuantizerCase("codebook", lambda b: Codebook(bits=b, outliers=0.0), (2, 3, 4, 6)),
    QuantizerCase("codebook_outliers", lambda b: Codebook(bits=b, outliers=0.1)),
    QuantizerCase(
        "codebook_channel", lambda b: Codebook(bits=b, axis="channel", outliers=0.03), fitted=RANGES
    ),
)
