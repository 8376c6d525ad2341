# SPDX-License-Identifier: Apache-2.0
"""What makes forecasts: emulators from the folders of training runs, persistence, climatology.

A forecaster turns the states up to a time into the states after it, one step at a time, all in the
units of the evaluation (normalised by the statistics of the first model).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from eval.forecast_config import EmulatorEntry
from eval.weights import trained_params
from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.fields import Archive
from sqzjax.fields.statistics import Statistics
from sqzjax.forecast_losses import with_constants
from sqzjax.io import checkpoint
from sqzjax.models.config import Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.typing import Array, Float, Params

STATISTICS = "statistics.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint of an emulator and what its run was told; the weights are not read yet."""

    name: str
    folder: Path  # of the step
    workdir: Path
    model: SwinEmulator
    data: Mapping[str, Any]  # the run's configuration of its data
    average: bool  # whether the run kept an average of its parameters
    statistics: Statistics

    @property
    def source(self) -> str:
        """Say in words what is evaluated."""
        return f"checkpoint at step {self.folder.name} of {self.workdir}"

    def params(self) -> Params:
        """Read the parameters, or the average of a run that kept one."""
        expected = self.model.abstract_params()
        return trained_params(self.folder, averaged=self.average, expected=expected)

    def check(self, archive: Archive) -> None:
        """Refuse an archive that is not what the model forecasts; ConfigError."""
        config, constants = self.model.config, self.data["constants"]
        shape, found = (config.out_channels, config.grid), (len(archive.channels), archive.grid)
        if shape != found:
            raise ConfigError(
                f"model {self.name!r} forecasts {shape[0]} channels on {shape[1]}; the archive "
                f"{archive.path} has {found[0]} on {found[1]}; choose another archive"
            )
        config.check_feedback()
        fixed = config.in_channels - config.out_channels
        lacking = [name for name in constants if name not in archive.constant_names]
        if len(constants) != fixed or lacking:
            raise ConfigError(
                f"model {self.name!r} reads {fixed} constants, its run names {list(constants)}, "
                f"and the archive {archive.path} has {list(archive.constant_names)}; choose the "
                "archive it was trained on"
            )


def find_all(entries: Sequence[EmulatorEntry]) -> list[Found]:
    """Locate all runs; ConfigError says what is missing of each."""
    found, problems = [], []
    for entry in entries:
        try:
            found.append(find(entry))
        except (CheckpointError, ConfigError, DataError) as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems)
    return found


def find(entry: EmulatorEntry) -> Found:
    """Locate a run's checkpoint and read what it was; CheckpointError says what is missing."""
    workdir = Path(entry.path)
    checkpoints = checkpoint.Checkpointer(workdir / "checkpoints")
    step = checkpoints.latest_good() if entry.step is None else entry.step
    if step is None or step not in checkpoints.steps():
        raise CheckpointError(
            f"model {entry.name!r}: {workdir / 'checkpoints'} holds no "
            f"{'complete step' if step is None else f'step {step}'}; it has {checkpoints.steps()}"
        )
    folder = checkpoints.directory / str(step)
    meta = checkpoint.read_meta(folder)
    run = meta.get("config", {})
    if run.get("model", {}).get("kind") != "swin" or run.get("data", {}).get("kind") != "fields":
        raise CheckpointError(f"model {entry.name!r}: {folder} is no emulator trained on fields")
    path = run["data"].get("statistics") or workdir / "data" / STATISTICS
    config = configs.load(SwinConfig, meta["model"])
    return Found(
        name=entry.name,
        folder=folder,
        workdir=workdir,
        model=SwinEmulator(config, configs.load(Execution, run.get("execution", {}))),
        data=run["data"],
        average=run.get("ema") is not None,
        statistics=Statistics.load(path),
    )


class Forecaster(Protocol):
    """Something that makes forecasts, a batch at a time."""

    @property
    def name(self) -> str:
        """What the report calls it."""
        ...

    def start(self, window: Float[Array, "B T C H W"]) -> Any:
        """Return the state of a forecast from the states up to its start, the newest last."""
        ...

    def advance(
        self, state: Any, climate: Float[Array, "B C H W"]
    ) -> tuple[Any, Float[Array, "B C H W"]]:
        """Return the next state and the fields it stands for; `climate` is the mean state then."""
        ...


@dataclass(frozen=True)
class Persistence:
    """Nothing changes."""

    name: str = "persistence"

    def start(self, window: Array) -> Array:
        """Return the newest state."""
        return window[:, -1]

    def advance(self, state: Array, climate: Array) -> tuple[Array, Array]:
        """Return it again."""
        del climate
        return state, state


@dataclass(frozen=True)
class FromClimatology:
    """The mean state of the time of year and day."""

    name: str = "climatology"

    def start(self, window: Array) -> None:
        """Return nothing: the start does not matter."""
        del window

    def advance(self, state: None, climate: Array) -> tuple[None, Array]:
        """Return the mean state."""
        return state, climate


@dataclass(frozen=True)
class Emulator:
    """A model run on its own output; it reads and writes its own units, not the evaluation's."""

    name: str
    model: Any
    params: Params = field(repr=False)
    constants: np.ndarray = field(repr=False)  # K H W
    scale: np.ndarray  # C; own units are scale times the evaluation's, plus offset
    offset: np.ndarray  # C

    @classmethod
    def load(cls, found: Found, reference: Statistics, archive: Archive) -> "Emulator":
        """Read the weights; `reference` are the evaluation's units.

        CheckpointError for damaged weights, DataError for statistics of other channels.
        """
        own, common = found.statistics.select(reference.channels), reference
        return cls(
            name=found.name,
            model=found.model,
            params=found.params(),
            constants=archive.constants(found.data["constants"]),
            scale=common.std / own.std,
            offset=(common.mean - own.mean) / own.std,
        )

    def start(self, window: Float[Array, "B T C H W"]) -> Array:
        """Return the last states that the model reads, in its units."""
        context = self.model.config.context
        scale, offset = (a.astype(np.float32)[:, None, None] for a in (self.scale, self.offset))
        return window[:, -context:] * scale + offset

    def advance(self, state: Array, climate: Array) -> tuple[Array, Array]:
        """Run one step of the model."""
        del climate
        return self._step(self.params, state)

    @cached_property
    def _step(self) -> Callable[..., tuple[Array, Array]]:
        constants = jnp.asarray(self.constants)
        scale, offset = (a.astype(np.float32)[:, None, None] for a in (self.scale, self.offset))

        @jax.jit
        def step(params: Params, window: Array) -> tuple[Array, Array]:
            fixed = jnp.broadcast_to(constants, (len(window), *constants.shape))
            new = self.model.forward(params, with_constants(window, fixed))
            return jnp.concatenate([window[:, 1:], new[:, None]], axis=1), (new - offset) / scale

        return step
