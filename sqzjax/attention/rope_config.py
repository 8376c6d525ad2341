# SPDX-License-Identifier: Apache-2.0
"""Configuration of the rotary embedding, free of jax so that configs validate quickly."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, half-split (rotate-half) form.

    `linear` divides positions by `factor`; `llama3` and `yarn` (arXiv 2309.00071) rescale the
    frequencies. `attention_factor` multiplies cos and sin; None means the kind's own rule.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ValueError(f"rope theta={self.theta} must be > 0; Llama uses 10000.0")
        if self.factor <= 0:
            raise ValueError(f"rope factor={self.factor} must be > 0; 1.0 means no scaling")
        if self.kind in ("llama3", "yarn") and self.original_max_positions <= 0:
            raise ValueError(
                f"rope original_max_positions={self.original_max_positions} must be > 0 for kind="
                f"{self.kind!r}; give the context length before scaling"
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope high_freq_factor={self.high_freq_factor} must be > low_freq_factor="
                f"{self.low_freq_factor}; Llama 3 uses 4.0 and 1.0"
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError("rope theta=1.0 has no wavelengths to interpolate; use 10000.0")
