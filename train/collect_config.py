# SPDX-License-Identifier: Apache-2.0
"""The schema of a recording of teacher trajectories. Nothing here imports jax."""

from dataclasses import dataclass
from typing import Literal

from sqzjax.checks import check_seed
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.sharding_config import MeshConfig, Rule, check_rules
from train.data.config import DataConfig
from train.model_source import ModelSource


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Record how a teacher fills responses, for `objective.kind: cdlm` (arXiv 2511.19269).

    Each training document of `data` that has a prompt gives one trajectory per temperature: the
    prompt, `length` tokens filled one per step in blocks of `block_size` counted from position 0,
    and the document's own response as the reference. Prompts of more than `max_prompt` tokens are
    left out, and of the others only the first `count` are used (null: all). `batch_size` prompts
    run at a time; `shard_size` trajectories are saved at a time, and a run that is stopped loses
    at most that many.
    """

    kind: Literal["collect"] = "collect"
    model: ModelSource
    execution: Execution = Execution()
    data: DataConfig = DataConfig()
    length: int = 256
    block_size: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.5)
    max_prompt: int = 512
    count: int | None = None
    batch_size: int = 16
    shard_size: int = 64
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for name in ("block_size", "max_prompt", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count={self.count} must be >= 1, or null for all prompts")
        if not self.block_size <= self.length < 1 << 15:
            raise ValueError(
                f"length={self.length} must lie in [block_size={self.block_size}, {1 << 15})"
            )
        check_seed(self.seed)
        bad = [t for t in self.temperatures if not 0 <= t < float("inf")]
        if bad or not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise ValueError(
                f"temperatures={list(self.temperatures)} must be different numbers >= 0, such as "
                "[0.0, 0.5]"
            )
        check_rules(self.rules)

    def resolve_model(self) -> ModelConfig:
        """Return the teacher's architecture; ValueError if the other settings do not suit it."""
        config = self.model.resolve()
        if config.mask == "causal":
            raise ValueError(
                f"model: mask={config.mask!r}; trajectories are those of a masked diffusion model"
            )
        if self.max_prompt + self.length > config.max_positions:
            raise ValueError(
                f"max_prompt={self.max_prompt} + length={self.length} exceed the model's "
                f"max_positions={config.max_positions}; lower one of them"
            )
        return config
