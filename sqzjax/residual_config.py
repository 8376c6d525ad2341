# SPDX-License-Identifier: Apache-2.0
"""Settings of the residual of re-masked positions; nothing here imports jax."""

import math
from dataclasses import dataclass
from typing import Literal

AlphaRule = Literal[
    "entropy", "one_minus_entropy", "max_prob", "one_minus_max_prob", "fixed", "top1"
]


@dataclass(frozen=True, kw_only=True)
class ResidualSettings:
    """How a discarded prediction becomes a residual (RCD, arXiv 2601.22954).

    `alpha_rule` gives the weight of the residual: "entropy" is the paper's normalised entropy;
    "top1" weighs like it but mixes in only the most probable token; "fixed" is `alpha_scale`
    itself. Every weight is multiplied by `alpha_scale` and clamped to [0, 1]. `temperature`
    (T_res) softens the distribution that the weight is computed from, and with `temper_delta` also
    the mixture. `mask_column` "drop" takes the mask token's probability away and renormalises.
    `top_k` > 0 mixes only that many rows and gives the rest of the probability to the mean
    embedding.
    """

    alpha_rule: AlphaRule = "entropy"
    temperature: float = 1.0
    temper_delta: bool = False
    alpha_scale: float = 1.0
    mask_column: Literal["keep", "drop"] = "keep"
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be > 0; 1 leaves it as it is")
        if not 0 <= self.alpha_scale < math.inf:
            raise ValueError(f"alpha_scale={self.alpha_scale} must be >= 0; 1 is the paper's")
        if self.alpha_rule == "fixed" and self.alpha_scale > 1:
            raise ValueError(
                f"alpha_scale={self.alpha_scale} is the weight itself under alpha_rule='fixed' and "
                "must be <= 1"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0 (0: all tokens)")
        if self.top_k and self.alpha_rule == "top1":
            raise ValueError(
                f"top_k={self.top_k} has no meaning for alpha_rule='top1', which mixes one token; "
                "set it to 0"
            )
