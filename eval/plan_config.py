# SPDX-License-Identifier: Apache-2.0
"""What a capacity plan compiles, and for which chips. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from eval.speed_config import SpeedModel
from sqzjax.analysis import Hardware
from sqzjax.analysis.topology import Topology
from sqzjax.models.config import ModelConfig
from sqzjax.models.sizes import SIZES
from sqzjax.sharding_config import MeshConfig


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
    """A greedy decode step of `batch_size` rows on all chips, with a dense cache of `context`.

    `queries` are the tokens of a row that one step computes: the block of a diffusion model, the
    draft that speculation verifies. `context` counts them too.
    """

    mesh: MeshConfig = MeshConfig(data=-1)
    batch_size: int = 64
    context: int = 8192
    queries: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, context=self.context, queries=self.queries)
        if self.queries > self.context:
            raise ValueError(
                f"queries={self.queries} must be at most context={self.context}, which counts them"
            )


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
        Topology(self.topology)  # refuses what is none
        if not self.models:
            raise ValueError("models=() must name at least one model")
        if self.train is None and self.decode is None:
            raise ValueError("train and decode are both null; give at least one program")
        _at_least_one(timeout_s=self.timeout_s)

    @property
    def num_chips(self) -> int:
        """Chips of the topology; on every kind here a chip is one device."""
        return Topology(self.topology).num_chips

    @property
    def hardware(self) -> Hardware:
        """Peak figures of one chip."""
        return Topology(self.topology).hardware


def architecture_of(entry: SpeedModel) -> ModelConfig:
    """Return a model's shape without loading weights."""
    if entry.path is not None:
        from sqzjax.io import hf

        return hf.read_config(entry.path)
    return entry.architecture or SIZES[entry.name]
