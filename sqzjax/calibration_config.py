# SPDX-License-Identifier: Apache-2.0
"""What a KVQuant calibration is to make; nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

FORMAT = "3"
"""Of the file that a calibration leaves."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Codebooks of each of `bits` for each fraction of `outliers` (arXiv 2401.18079).

    The first `sinks` tokens of every document count nowhere. `weighting` of an element: "paper" its
    squared gradient times its squared scale (Eq. 7), "released" the squared gradient alone, as the
    authors' code has it, "none" the squared scale alone. `bins` are those of the k-means,
    `range_bins` those that find the ranges of keys: a percentile is off by at most the channel's
    extent over `range_bins`. `ranges` of keys are the "percentile"s with `outliers` beyond them, as
    in the paper, or, "fitted", of a few from these to the whole extent the one of least error in
    each layer: a head has few slots, and an outlier that finds none is clipped. `rope` says whether
    keys are seen "pre" or "post" rotation.
    """

    bits: tuple[int, ...] = (2, 3, 4)
    outliers: tuple[float, ...] = (0.0, 0.01)
    sinks: int = 1
    weighting: Literal["paper", "released", "none"] = "paper"
    ranges: Literal["fitted", "percentile"] = "fitted"
    rope: Literal["pre", "post"] = "pre"
    bins: int = 8192
    range_bins: int = 2048

    def __post_init__(self) -> None:
        bad = [bits for bits in self.bits if bits not in (2, 3, 4, 6)]
        if bad or not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError(f"bits={list(self.bits)} must be different ones of 2, 3, 4, 6")
        bad = [fraction for fraction in self.outliers if not 0 <= fraction < 0.5]
        if bad or not self.outliers or len(set(self.outliers)) < len(self.outliers):
            raise ValueError(
                f"outliers={list(self.outliers)} must be different fractions in [0, 0.5), such as "
                "[0.0, 0.01]"
            )
        if self.weighting == "released" and self.ranges == "fitted":
            raise ValueError(
                "ranges='fitted' needs errors that compare between ranges, which "
                "weighting='released' does not give; set ranges to 'percentile'"
            )
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be >= 0")
        for name, least in (("bins", 1024), ("range_bins", 256)):
            if not least <= getattr(self, name) <= 1 << 16:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [{least}, 65536]")
