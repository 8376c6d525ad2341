# SPDX-License-Identifier: Apache-2.0
"""Mean and spread of every channel, computed once in float64 and kept as JSON.

Plain averages over times and points, not weighted by area, as in the code of arXiv 2603.25687.
Only the states that are asked for are read, each once; missing values do not count. Nothing here
imports jax.
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

FORMAT = 2
_CHUNK_BYTES = 1 << 24
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel."""

    channels: tuple[str, ...]
    mean: np.ndarray  # float64 C
    std: np.ndarray  # float64 C
    states: int
    """How many states were averaged."""
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
        """Return the statistics of these channels, by their full names and in their order.

        DataError names those that are lacking.
        """
        lacking = [name for name in channels if name not in self.channels]
        if lacking:
            raise DataError(f"the statistics lack channels {lacking}; they have {self.channels}")
        slots = [self.channels.index(name) for name in channels]
        return replace(self, channels=tuple(channels), mean=self.mean[slots], std=self.std[slots])

    @property
    def digest(self) -> str:
        """The sha256 of what normalisation depends on."""
        text = json.dumps([list(self.channels), self.mean.tolist(), self.std.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "source": self.source,
            "states": self.states,
            "channels": list(self.channels),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
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
                states=int(found["states"]),
                source=str(found["source"]),
            )
            wanted = (len(made.channels),)
            if not made.mean.shape == made.std.shape == wanted:
                raise ValueError("one value per channel is needed")
            if not (np.isfinite([made.mean, made.std]).all() and (made.std > 0).all()):
                raise ValueError("means and deviations must be finite, and deviations > 0")
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
    path: str | Path | None = None,
) -> Statistics:
    """Return the statistics of these times: read from `path` if it holds them, else computed.

    What is computed is written to `path`; a file of another archive or period is replaced.
    """
    times = np.asarray(times, np.int64)
    source = _source(archive, times)
    if path is not None and Path(path).exists():
        try:
            stored = Statistics.load(path)
        except DataError as error:
            _log.warning("%s", error)
        else:
            if stored.source == source:
                return stored
    found = compute(archive, times, source=source)
    if path is not None:
        found.save(path)
    return found


def compute(archive: Archive, times: np.ndarray, *, source: str = "") -> Statistics:
    """Read the states of these time indices, some at a time, and return their statistics.

    Rounded to nine digits, so that the order of sums, which differs between machines, does not
    show. DataError if a channel does not vary or is missing throughout.
    """
    moments = Moments(len(archive.channels))
    size = max(1, _CHUNK_BYTES // archive.state_bytes)
    _log.info("statistics of %d states of %s", len(times), archive.path)
    for begin in range(0, len(times), size):
        moments.add(archive.read(times[begin : begin + size]))
    still = [name for name, std in zip(archive.channels, moments.std) if not std > 0]
    if still:
        raise DataError(
            f"{archive.path}: channels {still} do not vary, or are missing throughout; leave them "
            "out of `channels`"
        )
    return Statistics(
        channels=archive.channels,
        mean=_rounded(moments.mean),
        std=_rounded(moments.std),
        states=len(times),
        source=source,
    )


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.array([float(f"{value:.9g}") for value in values])


def _source(archive: Archive, times: np.ndarray) -> str:
    text = f"{FORMAT} {archive.fingerprint} ".encode()
    return hashlib.sha256(text + times.astype("<i8").tobytes()).hexdigest()
