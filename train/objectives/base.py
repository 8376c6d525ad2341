# SPDX-License-Identifier: Apache-2.0
"""What a training objective is: a frozen configuration with a loss method.

Nothing here imports jax at import time, so that configurations are checked quickly.
"""

from typing import Any, NamedTuple, Protocol

from sqzjax.models.config import ModelConfig


class LossOutput(NamedTuple):
    """A loss as (sum, weight), so that microbatches and devices add up exactly.

    `sum` and `weight` are float32 scalars, the mean is their quotient; `sum` is differentiated.
    `metrics` maps names such as "accuracy" to pairs of the same kind.
    """

    sum: Any
    weight: Any
    metrics: dict[str, tuple[Any, Any]]


class Reference(NamedTuple):
    """A second, frozen model: its definition and its parameters."""

    model: Any
    params: Any


class Objective(Protocol):
    """A frozen dataclass whose fields are the configuration of the loss.

    A field `reference: ModelSource` makes the trainer load that model too, never train it, and
    hand it to `loss`. An objective that needs more than documents may have `check_run(data_kind=,
    adapters=)` and `check_data(dataset, model_config)`, which raise ValueError. One that needs
    large constants may have `tables(model_config, *, abstract=False)`, which returns a pytree of
    arrays, or of their shapes if `abstract`, or None; `loss` gets it as `tables`, on the devices.
    """

    @property
    def kind(self) -> str:
        """Tag of the objective in a configuration file."""
        ...

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Raise ValueError if the objective cannot train such a model."""
        ...

    def loss(
        self,
        model: Any,
        params: Any,
        batch: Any,
        key: Any,
        *,
        train: bool,
        lora: Any = None,
        reference: Reference | None = None,
    ) -> LossOutput:
        """Return the loss of a batch (tokens, positions, segment_ids, loss_mask, all [B, T]).

        Pure and traceable; differentiated in `params`, or in `lora` when that is trained and
        `params` is frozen. `key` differs between steps; draw with `row_uniform`, so that gradient
        accumulation changes nothing. A batch without a target must give `weight` 0 and finite
        numbers.
        """
        ...


def row_uniform(batch: Any, key: Any, shape: tuple[int, ...] = ()) -> Any:
    """Return uniform draws float32 `[B, *shape]` that belong to the rows of a batch.

    A row's draws depend on the key and its number in the whole batch (the column "row", else its
    place), so that microbatches and devices draw what one batch would.
    """
    import jax
    import jax.numpy as jnp

    rows = batch["row"] if "row" in batch else jnp.arange(batch["tokens"].shape[0])
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row), shape))(rows)
