# SPDX-License-Identifier: Apache-2.0
"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases on request."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sqzjax.errors import ConfigError
from sqzjax.io import atomic


class Tracker(Protocol):
    """Receives scalars by name (`train/loss`) at a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Write everything out."""
        ...


class JsonLines:
    """One JSON object per line, appended; non-finite numbers are written as null.

    Evaluations are on disk when `log` returns, and so before the checkpoint of their step: a run
    that resumes at its end does not repeat them.
    """

    def __init__(self, path: Path):
        self._file = path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append and flush a line."""
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if any(name.startswith("eval/") for name in metrics):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def truncate(path: Path, step: int) -> int:
    """Drop the lines after `step`, and a line cut off by a kill; return how many were dropped.

    A run that resumes from `step` then leaves the same file as one that was never interrupted.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and _step_of(line) <= step:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))
    return dropped


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Event files in `folder`; needs the extra `tensorboard`."""

    def __init__(self, folder: Path, first_step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "log.trackers: 'tensorboard' needs tensorboardX; install sqzjax[tensorboard]"
            ) from None
        # Tells the viewer to hide what an interrupted run wrote beyond this step.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandB:
    """A Weights & Biases run, continued on resume; needs the extra `wandb`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError("log.trackers: 'wandb' needs wandb; install sqzjax[wandb]") from None
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            dir=str(folder), id=identity.read_text(), resume="allow", config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics at the step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_trackers(
    names: tuple[str, ...], workdir: Path, step: int, config: Mapping[str, Any]
) -> list[Tracker]:
    """Open the JSON lines and the trackers named, to go on after `step`."""
    made: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            made.append(TensorBoard(workdir / "tensorboard", step))
        else:
            made.append(WandB(workdir, config))
    truncate(workdir / "metrics.jsonl", step)
    return [JsonLines(workdir / "metrics.jsonl"), *made]


@contextmanager
def closing(trackers: list[Tracker]) -> Iterator[list[Tracker]]:
    """Close all trackers at the end."""
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.close()
