# SPDX-License-Identifier: Apache-2.0
"""What a family is: how its models are built, fed, counted, loaded and exported."""

from pathlib import Path
from typing import Any, Protocol

from jax.sharding import Mesh, NamedSharding

from sqzjax.models.config import Execution
from sqzjax.typing import Key, Params, PyTree
from train.config import TrainConfig

Columns = dict[str, tuple[tuple[int, ...], Any]]
"""Shape of a row and dtype of every column of a batch."""


class Family(Protocol):
    """Everything that differs between kinds of runs; the trainer asks it and knows neither."""

    @property
    def unit(self) -> str:
        """What is counted: "tokens" or "samples"."""
        ...

    def define(self, model_config: Any, execution: Execution) -> Any:
        """Return a model: `config`, `execution`, `init_params(key)`, `abstract_params()`."""
        ...

    def complete(self, model_config: Any, dataset: Any) -> Any:
        """Return the architecture for these data; ConfigError if they do not suit it."""
        ...

    def columns(self, config: TrainConfig) -> Columns:
        """Return the columns of the run's batches, without its data."""
        ...

    def sharding(self, mesh: Mesh, ndim: int) -> NamedSharding:
        """Return where a column of a batch with `ndim` dimensions lies."""
        ...

    def units_per_step(self, config: TrainConfig) -> int:
        """Return the tokens or samples of a step."""
        ...

    def step_flops(self, config: TrainConfig, model_config: Any) -> float:
        """Return the operations of a training step, recomputation apart."""
        ...

    def activation_bytes(self, config: TrainConfig, model: Any, rows: int) -> int:
        """Estimate what `rows` rows keep for the backward pass."""
        ...

    def load(self, source: Any, model: Any, shardings: PyTree, key: Key) -> Params:
        """Read the parameters of a model source, or create fresh ones, on these shardings."""
        ...

    def export(self, folder: Path, model: Any, params: Params, dataset: Any) -> None:
        """Write the model in the layout that others read."""
        ...
