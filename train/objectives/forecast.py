# SPDX-License-Identifier: Apache-2.0
"""Predict the next states of fields on a grid: the objective of weather emulators."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sqzjax.errors import ConfigError
from sqzjax.fields.channel_weights import channel_weights
from sqzjax.fields.names import canonical_channel
from train.objectives.base import LossOutput, Reference

ErrorKind = Literal["mse", "weighted_mse", "amse"]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Error of `rollout` steps of the model from true states, averaged over steps and channels.

    `error`: "mse" is the plain mean over channels and points; "weighted_mse" weighs points by area,
    and channels by what GraphCast gives to those of these names if `channels` repeats the list of
    the data (short names will do), or by `channel_weights` (divided by their mean); "amse" is the
    adjusted error of the spectra (arXiv 2501.19374), which keeps small scales sharp, for cooldowns
    of models trained on "mse". It weighs channels only if told, and uses degrees up to `truncation`
    (null: all that the grid determines); fewer take less memory (`sqzjax.sphere.harmonics`).
    `unresolved` adds the square error that harmonics do not see, such as noise along the rows next
    to the poles: 0 is as published, but a model that runs on its own output needs about 1.
    """

    family: ClassVar[str] = "fields"
    kind: Literal["forecast"] = "forecast"
    error: ErrorKind = "mse"
    rollout: int = 1
    channels: tuple[str, ...] = ()
    channel_weights: tuple[float, ...] | None = None
    truncation: int | None = None
    unresolved: float = 0.0

    def __post_init__(self) -> None:
        if type(self.rollout) is not int or self.rollout < 1:
            raise ValueError(
                f"rollout={self.rollout} must be an integer >= 1; 1 predicts the next state"
            )
        if self.truncation is not None and self.error != "amse":
            raise ValueError(f"truncation={self.truncation} is of error: amse; remove it")
        if not 0 <= self.unresolved < math.inf or (self.unresolved and self.error != "amse"):
            raise ValueError(f"unresolved={self.unresolved} must be >= 0, and is of error: amse")
        weights = self.channel_weights
        if self.error == "mse" and (self.channels or weights is not None):
            raise ValueError("error: mse weighs no channels; remove them or use weighted_mse")
        if self.channels and weights is not None and len(weights) != len(self.channels):
            raise ValueError(
                f"channel_weights has {len(weights)} numbers for {len(self.channels)} channels"
            )
        if weights is not None and not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"channel_weights={weights} must be finite numbers >= 0")
        if weights is not None and not sum(weights) > 0:
            raise ValueError(f"channel_weights={weights} must not all be zero")

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Weights of the channels, mean 1; None where all weigh alike."""
        if self.channel_weights is None:
            return channel_weights(self.channels) if self.channels else None
        mean = sum(self.channel_weights) / len(self.channel_weights)
        return tuple(weight / mean for weight in self.channel_weights)

    def check(self, config: Any, seq_len: int = 0) -> None:
        """Refuse weights of other channels, and spectra on a grid that has none."""
        from sqzjax.sphere.harmonics import Transform

        del seq_len
        config.check_feedback()
        weights = self.weights
        if weights is not None and len(weights) != config.out_channels:
            raise ValueError(
                f"objective has weights of {len(weights)} channels and the model predicts "
                f"{config.out_channels}; name them in the order of data.channels"
            )
        if self.error == "amse":
            Transform(config.grid, self.truncation)

    def check_run(self, *, data_kind: str, adapters: bool) -> None:
        """Refuse adapters, which emulators do not have."""
        del data_kind
        if adapters:
            raise ValueError("objective.kind='forecast' trains whole emulators; remove lora")

    def check_data(self, dataset: Any, model_config: Any) -> None:
        """Refuse channels that are not the data's, in their order; short names will do."""
        del model_config
        own, data = (list(map(canonical_channel, c)) for c in (self.channels, dataset.channels))
        if own and own != data:
            raise ConfigError(
                f"objective.channels={self.channels} are not the channels of the data, "
                f"{tuple(dataset.channels)}; they must be the same, in the same order"
            )

    def tables(self, model_config: Any, *, abstract: bool = False) -> Any:
        """Return the tables of Legendre functions that `loss` takes, float32; None without spectra.

        They take gigabytes on fine grids, too much for constants of a program. `abstract`: their
        shapes, without computing them.
        """
        if self.error != "amse":
            return None
        import jax
        import jax.numpy as jnp

        from sqzjax.forecast_losses import spectral_tables
        from sqzjax.sphere.harmonics import AnalysisTables, SynthesisTables, Transform

        transform = Transform(model_config.grid, self.truncation)
        if not abstract:
            return spectral_tables(transform, self.unresolved)
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in transform.table_shapes)
        blocks = tuple(shapes)
        return AnalysisTables(blocks), SynthesisTables(blocks) if self.unresolved else None

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
        tables: Any = None,
    ) -> LossOutput:
        """Return the loss of a batch: `fields` [B, S, C, H, W], `constants` and `weight` [B].

        S is the model's context and `rollout` states. `tables` are those of the method; without
        them they become constants of the program. Metrics, whatever the loss: "mse", and
        "rmse_step_1" and so on weighted by area, all in normalised units.
        """
        import jax.numpy as jnp

        from sqzjax import forecast_losses

        del key, train, lora, reference
        context = model.config.context
        fields = batch["fields"].astype(jnp.float32)
        if fields.shape[1] != context + self.rollout:
            raise ValueError(
                f"samples of {fields.shape[1]} states cannot train a rollout of {self.rollout} "
                f"steps from {context}; they need {context + self.rollout}"
            )
        states = forecast_losses.rollout(
            model, params, fields[:, :context], batch["constants"], self.rollout
        )
        truth = jnp.moveaxis(fields[:, context:], 1, 0)
        weight = batch["weight"].astype(jnp.float32)
        grid = model.config.grid
        rmse = jnp.sqrt(forecast_losses.area_mse(states, truth, grid)).mean(-1)
        metrics = {f"rmse_step_{step + 1}": rmse[step] for step in range(self.rollout)}
        metrics["mse"] = forecast_losses.mse(states, truth).mean(0)
        per_row = self._errors(states, truth, grid, tables).mean(0)
        total = weight.sum()
        sums = {name: ((values * weight).sum(), total) for name, values in metrics.items()}
        return LossOutput((per_row * weight).sum(), total, sums)

    def _errors(self, states: Any, truth: Any, grid: Any, tables: Any) -> Any:
        """Return the error of every step and row, [n, B]."""
        from sqzjax import forecast_losses
        from sqzjax.sphere.harmonics import Transform

        match self.error:
            case "mse":
                return forecast_losses.mse(states, truth)
            case "weighted_mse":
                return forecast_losses.weighted_mse(states, truth, grid, self.weights)
            case "amse":
                transform = Transform(grid, self.truncation)
                return forecast_losses.amse(
                    states,
                    truth,
                    transform,
                    channel_weights=self.weights,
                    unresolved=self.unresolved,
                    tables=tables,
                )
