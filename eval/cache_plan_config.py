# SPDX-License-Identifier: Apache-2.0
"""Which caches, models and lengths a plan of cache bytes covers. Imports no jax."""

from dataclasses import dataclass
from typing import Literal

from eval.cache_rows import CacheEntry, all_rows
from eval.speed_config import SpeedModel
from sqzjax.sharding_config import MeshConfig


@dataclass(frozen=True, kw_only=True)
class CachePlanConfig:
    """Bytes of every cache for every model at every context, in total and per device of `mesh`.

    Nothing is allocated, so contexts of ten million tokens take seconds. `batch` sequences are
    split over the batch axes of the mesh and kv heads over `tensor`. `dtype` is that of exact keys
    and values. A model is a named size, an architecture, or a Hugging Face folder, of which only
    `config.json` is read; contexts beyond what it was trained for are computed like any other.
    """

    kind: Literal["cache_bytes"] = "cache_bytes"
    models: tuple[SpeedModel, ...]
    caches: tuple[CacheEntry, ...]
    contexts: tuple[int, ...] = (131_072, 1_048_576, 10_000_000)
    batch: int = 1
    mesh: MeshConfig = MeshConfig(data=1, tensor=8)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    workdir: str = "runs/cache_bytes"

    def __post_init__(self) -> None:
        if not self.models or not self.contexts or min(*self.contexts, self.batch) < 1:
            raise ValueError(
                f"models={[model.name for model in self.models]}, contexts={self.contexts} and "
                f"batch={self.batch} must be one or more models, and numbers >= 1"
            )
        if -1 in (self.mesh.data, self.mesh.fsdp, self.mesh.tensor):
            raise ValueError(f"mesh={self.mesh} must give every axis a size; nothing is there yet")
        all_rows(self.caches)
