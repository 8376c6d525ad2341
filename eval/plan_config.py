# SPDX-License-Identifier: Apache-2.0
"""What a capacity plan compiles, and for which chips. Imports no jax."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from eval.speed_config import SpeedModel
from sqzjax.analysis import DEVICES, Hardware
from sqzjax.models.config import ModelConfig
from sqzjax.models.sizes import SIZES
from sqzjax.sharding_config import MeshConfig

MAX_CHIPS = 256
CHIPS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
"""Chip names of topologies, and their records in `sqzjax.analysis.DEVICES`."""
_TOPOLOGY = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class TrainProgram:
    """A training step: forward, backward and AdamW over `batch_size` sequences on all chips."""

    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    batch_size: int = 64
    seq_len: int = 4096
    remat: Literal["none", "full", "dots"] = "full"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, seq_len=self.seq_len)


@dataclass(frozen=True, kw_only=True)
class DecodeProgram:
    """A greedy decode step of `batch_size` rows on all chips, with a dense cache of `context`."""

    mesh: MeshConfig = MeshConfig(data=-1)
    batch_size: int = 64
    context: int = 8192
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, context=self.context)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Programs compiled for a TPU topology that need not be there, and what they would cost.

    `topology` is a chip (v4, v5e, v5p, v6e) and the size of its torus, for example v5p:4x4x4.
    `train` and `decode` may be null. A model is a named size, an architecture, or a Hugging Face
    folder, of which only `config.json` is read. `timeout_s` bounds one compilation.
    """

    kind: Literal["plan"] = "plan"
    models: tuple[SpeedModel, ...]
    topology: str = "v5p:4x4x4"
    train: TrainProgram | None = TrainProgram()
    decode: DecodeProgram | None = DecodeProgram()
    timeout_s: int = 1800
    workdir: str = "runs/plan"

    def __post_init__(self) -> None:
        found = _TOPOLOGY.fullmatch(self.topology)
        if found is None or found[1] not in CHIPS:
            raise ValueError(
                f"topology={self.topology!r} must be one of {', '.join(CHIPS)}, a colon and the "
                "size of the torus; for example v5p:4x4x4 or v5e:8x8"
            )
        if self.num_chips > MAX_CHIPS:
            raise ValueError(
                f"topology={self.topology!r} has {self.num_chips} chips and must have at most "
                f"{MAX_CHIPS}; plan a smaller slice"
            )
        if not self.models:
            raise ValueError("models=() must name at least one model")
        if self.train is None and self.decode is None:
            raise ValueError("train and decode are both null; give at least one program")
        _at_least_one(timeout_s=self.timeout_s)

    @property
    def num_chips(self) -> int:
        """Chips of the topology; on every kind here a chip is one device."""
        return math.prod(int(size) for size in self.topology.partition(":")[2].split("x"))

    @property
    def hardware(self) -> Hardware:
        """Peak figures of one chip."""
        return DEVICES[CHIPS[self.topology.partition(":")[0]]]


def architecture_of(entry: SpeedModel) -> ModelConfig:
    """Return a model's shape without loading weights."""
    if entry.path is not None:
        from sqzjax.io import hf

        return hf.read_config(entry.path)
    return entry.architecture or SIZES[entry.name]
