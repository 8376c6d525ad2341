# SPDX-License-Identifier: Apache-2.0
"""Runs of weather emulators on gridded fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sqzjax.errors import ConfigError
from sqzjax.models.config import Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.sharding import field_sharding
from sqzjax.typing import Key, Params, PyTree
from train.config import TrainConfig
from train.cost import step_flops
from train.families.base import Columns


@dataclass(frozen=True)
class Fields:
    """Swin emulators, consecutive states of an archive."""

    unit = "samples"

    def define(self, model_config: SwinConfig, execution: Execution) -> SwinEmulator:
        """Return the emulator."""
        return SwinEmulator(model_config, execution)

    def complete(self, model_config: SwinConfig, dataset: Any) -> SwinConfig:
        """Check grid and channels against the archive's."""
        channels, constants = len(dataset.channels), len(dataset.constant_names)
        wanted = {
            "grid": (model_config.grid, dataset.grid),
            "out_channels": (model_config.out_channels, channels),
            "in_channels": (model_config.in_channels, channels + constants),
        }
        problems = [
            f"model {name}={told!r}, the data have {found!r}"
            for name, (told, found) in wanted.items()
            if told != found
        ]
        if problems:
            raise ConfigError(
                "the model does not suit the data; change model.config or the channels of data:\n  "
                + "\n  ".join(problems)
            )
        return model_config

    def columns(self, config: TrainConfig) -> Columns:
        """Return states, constants and the weight of a sample."""
        model: Any = config.model.resolve()
        shape = (config.row_length, model.out_channels, *model.grid.shape)
        constants = (model.in_channels - model.out_channels, *model.grid.shape)
        return {
            "fields": (shape, np.float32),
            "constants": (constants, np.float32),
            "weight": ((), np.float32),
        }

    def sharding(self, mesh: Mesh, ndim: int) -> NamedSharding:
        """Return where a column lies: samples are split, fields too on meshes that say so."""
        return field_sharding(mesh, ndim)

    def units_per_step(self, config: TrainConfig) -> int:
        """Return the samples of a batch."""
        return config.batch_size

    def step_flops(self, config: TrainConfig, model_config: SwinConfig) -> float:
        """Return the operations of a step by the formula of arXiv 2603.25687's code."""
        return step_flops(config, model_config)

    def activation_bytes(self, config: TrainConfig, model: SwinEmulator, rows: int) -> int:
        """Estimate what `rows` samples keep for the backward pass."""
        swin, execution = model.config, model.execution
        height, width = swin.window_size
        window = swin.context * height * width
        item_bytes = jnp.dtype(execution.dtype).itemsize
        scores = 2 * 4 * swin.heads * window  # float32 scores and probabilities
        linear = item_bytes * (4 * swin.embed_dim + 2 * swin.mlp_dim)
        block = linear + item_bytes * 4 * swin.embed_dim + scores
        kept = {"none": block, "dots": linear, "full": item_bytes * swin.embed_dim}
        steps = config.row_length - swin.context
        tokens = rows * swin.context * swin.tokens
        states = 4 * rows * config.row_length * swin.in_channels * swin.grid.latitudes
        whole = tokens * (kept[execution.remat] * swin.depth + block)
        # A rollout keeps the states between its steps and recomputes the rest.
        return whole + 2 * steps * states * swin.grid.longitudes

    def load(self, source: Any, model: SwinEmulator, shardings: PyTree, key: Key) -> Params:
        """Read a folder of weights by their original names, or create fresh parameters."""
        if source.path:
            from sqzjax.io import swin

            execution = model.execution
            _, params = swin.load(
                source.path, execution=execution, dtype=execution.param_dtype, shardings=shardings
            )
            return params
        return jax.jit(model.init_params, out_shardings=shardings)(key)

    def export(self, folder: Path, model: SwinEmulator, params: Params, dataset: Any) -> None:
        """Write `config.json` and `model.safetensors` with the original code's tensor names."""
        from sqzjax.io import swin

        swin.save(folder, model.config, params, overwrite=True)
