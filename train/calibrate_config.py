# SPDX-License-Identifier: Apache-2.0
"""The schema of a calibration run. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from sqzjax.calibration_config import CalibrationSettings
from sqzjax.checks import check_seed
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.sharding_config import MeshConfig, Rule, check_rules
from train.data.config import DataConfig
from train.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Calibrate the cache `kind: kvquant` on `samples` rows of `length` tokens of `data`.

    The rows are the first that training with the same `seed` would see. Progress is saved every
    `save_every` samples. Activations and gradients are float32 whatever `execution.dtype`;
    `execution.remat: full` takes less memory.
    """

    kind: Literal["calibrate"] = "calibrate"
    model: ModelSource
    execution: Execution = Execution(scan_layers=False)
    data: DataConfig = DataConfig()
    method: CalibrationSettings = CalibrationSettings()
    samples: int = 16
    length: int = 2048
    save_every: int = 4
    seed: int = 0
    mesh: MeshConfig = MeshConfig(data=1)
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("samples", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.length <= self.method.sinks + 1:
            raise ValueError(
                f"length={self.length} must exceed method.sinks={self.method.sinks} by more than 1"
            )
        check_seed(self.seed)
        check_rules(self.rules)

    def resolve_model(self) -> ModelConfig:
        """Return the architecture; ValueError if the other settings do not suit it."""
        config = self.model.resolve()
        if config.mask != "causal":
            raise ValueError(
                f"model: mask={config.mask!r}; the calibration needs the next-token loss of a "
                "causal model"
            )
        if self.length > config.max_positions:
            raise ValueError(
                f"length={self.length} exceeds the model's max_positions={config.max_positions}; "
                "lower it, or raise model.adjust.max_positions"
            )
        return config
