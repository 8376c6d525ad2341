# SPDX-License-Identifier: Apache-2.0
"""A schema with every construct that the config loader knows, for its tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Adam:
    """The first kind of optimizer."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be > 0; try 1e-3")


@dataclass(frozen=True, kw_only=True)
class Lion:
    """The second kind of optimizer."""

    kind: Literal["lion"] = "lion"
    learning_rate: float = 1e-4
    momentum: float = 0.9


Optimizer = Adam | Lion


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A single section whose `kind` is a mode, not the tag of a union."""

    kind: Literal["default", "linear"] = "default"
    theta: float = 1e4
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A section with required keys and a relation between them."""

    width: int
    heads: int = 4
    rope: Rope = Rope()
    tied: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads={self.heads} must be >= 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class File:
    """One of two exclusive keys."""

    path: str | None = None
    url: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.url is None):
            raise ValueError(f"path={self.path!r} and url={self.url!r}: give exactly one of them")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole."""

    model: Model
    optimizer: Optimizer = Adam(learning_rate=3e-4)
    files: tuple[File, ...] = ()
    name: str = "run"
    steps: int = 100
    batch: int = 8
    clip: float | None = 1.0
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("out")
    extra: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    by_name: dict[str, File] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
