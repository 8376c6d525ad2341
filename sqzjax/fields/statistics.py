# SPDX-License-Identifier: Apache-2.0
"""Mean and spread of every channel, computed once in float64 and kept as JSON.

Plain averages over times and points, not weighted by area, as in the code of arXiv 2603.25687. The
whole archive is streamed once; missing values do not count. Nothing here imports jax.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from sqzjax.errors import DataError
from sqzjax.fields.archive import Archive

FORMAT = 1
_CHUNK_BYTES = 1 << 24
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Per channel: mean, standard deviation, and that of the change over `step_hours`."""

    channels: tuple[str, ...]
    mean: np.ndarray  # float64 C
    std: np.ndarray  # float64 C
    step_std: np.ndarray  # float64 C
    step_hours: int
    states: int
    source: str
    """Which archive, channels and times they are of."""

    def normalise(self, fields: Float[np.ndarray, "... C H W"]) -> Float[np.ndarray, "... C H W"]:
        """Return (fields - mean) / std in float32; missing values become the mean, 0."""
        mean, std = (a[:, None, None].astype(np.float32) for a in (self.mean, self.std))
        return np.nan_to_num((fields - mean) / std, nan=0.0)

    def denormalise(self, fields: Float[np.ndarray, "... C H W"]) -> Float[np.ndarray, "... C H W"]:
        """Return fields in physical units, float32."""
        mean, std = (a[:, None, None].astype(np.float32) for a in (self.mean, self.std))
        return fields * std + mean

    def select(self, channels: Sequence[str]) -> "Statistics":
        """Return the statistics of these channels, in their order."""
        lacking = [name for name in channels if name not in self.channels]
        if lacking:
            raise DataError(f"the statistics lack channels {lacking}; they have {self.channels}")
        slots = [self.channels.index(name) for name in channels]
        arrays = {name: getattr(self, name)[slots] for name in ("mean", "std", "step_std")}
        return replace(self, channels=tuple(channels), **arrays)

    @property
    def digest(self) -> str:
        """The sha256 of what normalisation depends on."""
        text = json.dumps([list(self.channels), self.mean.tolist(), self.std.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name).tolist() for name in ("mean", "std", "step_std")}
        document = {
            "format": FORMAT,
            "source": self.source,
            "step_hours": self.step_hours,
            "states": self.states,
            "channels": list(self.channels),
            **arrays,
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read a file that `save` wrote; DataError if it is something else."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}")
            made = cls(
                channels=tuple(found["channels"]),
                mean=np.array(found["mean"], np.float64),
                std=np.array(found["std"], np.float64),
                step_std=np.array(found["step_std"], np.float64),
                step_hours=int(found["step_hours"]),
                states=int(found["states"]),
                source=str(found["source"]),
            )
            wanted = (len(made.channels),)
            if not made.mean.shape == made.std.shape == made.step_std.shape == wanted:
                raise ValueError("one value per channel is needed")
            if not (np.isfinite(made.mean).all() and (made.std > 0).all()):
                raise ValueError("means must be finite and deviations > 0")
            return made
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} holds no statistics ({error}); remove the setting or the file, and they "
                "are computed"
            ) from None


class Moments:
    """Mean and sum of squared deviations per channel, merged part by part in float64."""

    def __init__(self, channels: int):
        self.count = np.zeros(channels)
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, states: Float[np.ndarray, "S C H W"]) -> None:
        """Count these states; NaN is not counted (Chan, Golub and LeVeque, 1983)."""
        states = states.astype(np.float64)
        there = np.isfinite(states)
        count = there.sum((0, 2, 3)).astype(np.float64)
        safe = np.maximum(count, 1)
        mean = np.where(there, states, 0).sum((0, 2, 3)) / safe
        centred = np.where(there, states - mean[:, None, None], 0)
        total, delta = self.count + count, mean - self.mean
        share = count / np.maximum(total, 1)
        self._squares += (centred**2).sum((0, 2, 3)) + delta**2 * self.count * share
        self.mean += delta * share
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Standard deviation, of the population."""
        return np.sqrt(self._squares / np.maximum(self.count, 1))


def statistics_for(
    archive: Archive,
    times: Sequence[int] | np.ndarray,
    *,
    step_hours: int,
    path: str | Path | None = None,
) -> Statistics:
    """Return the statistics of these times: read from `path` if it holds them, else computed.

    What is computed is written to `path`; a file of another archive or period is replaced.
    """
    times = np.asarray(times, np.int64)
    source = _source(archive, times, step_hours)
    if path is not None and Path(path).exists():
        try:
            stored = Statistics.load(path)
        except DataError as error:
            _log.warning("%s", error)
        else:
            if stored.source == source:
                return stored
    found = compute(archive, times, step_hours=step_hours, source=source)
    if path is not None:
        found.save(path)
    return found


def compute(
    archive: Archive, times: np.ndarray, *, step_hours: int, source: str = ""
) -> Statistics:
    """Stream the states of these times; DataError if a channel does not vary."""
    whole, change = Moments(len(archive.channels)), Moments(len(archive.channels))
    later = _later(archive.times, times, step_hours)
    size = max(1, _CHUNK_BYTES // (2 * archive.state_bytes))
    _log.info("statistics of %d states of %s", len(times), archive.path)
    for begin in range(0, len(times), size):
        now, then = times[begin : begin + size], later[begin : begin + size]
        paired = then >= 0
        states = archive.read(np.concatenate([now, then[paired]])).astype(np.float64)
        whole.add(states[: len(now)])
        change.add(states[len(now) :] - states[: len(now)][paired])
    still = [name for name, std in zip(archive.channels, whole.std) if not std > 0]
    if still:
        raise DataError(
            f"{archive.path}: channels {still} do not vary, or are missing throughout; leave them "
            "out of `channels`"
        )
    return Statistics(
        channels=archive.channels,
        mean=whole.mean,
        std=whole.std,
        step_std=change.std,
        step_hours=step_hours,
        states=len(times),
        source=source,
    )


def _later(all_times: np.ndarray, times: np.ndarray, step_hours: int) -> np.ndarray:
    """Return the index of the state `step_hours` after each; -1 where there is none in `times`."""
    wanted = all_times[times] + np.timedelta64(step_hours, "h")
    found = np.minimum(np.searchsorted(all_times, wanted), len(all_times) - 1)
    there = (all_times[found] == wanted) & np.isin(found, times)
    return np.where(there, found, -1)


def _source(archive: Archive, times: np.ndarray, step_hours: int) -> str:
    text = f"{FORMAT} {archive.fingerprint} {step_hours}".encode()
    return hashlib.sha256(text + times.astype("<i8").tobytes()).hexdigest()
