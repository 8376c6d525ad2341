# SPDX-License-Identifier: Apache-2.0
"""Show how far a run is: a bar on a terminal, a log line per interval elsewhere."""

import logging
import sys
from collections.abc import Mapping

_log = logging.getLogger(__name__)
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/grad_norm": "grad norm {:.3g}",
    "train/learning_rate": "rate {:.2e}",
    "throughput/tokens_per_second": "{:,.0f} tokens/s",
    "throughput/samples_per_second": "{:,.0f} samples/s",
    "throughput/mfu": "MFU {:.1%}",
    "eval/held_out/loss": "held-out loss {:.4f}",
}


class Progress:
    """Use as a context manager; `terminal=None` looks at standard error."""

    def __init__(self, first: int, total: int, terminal: bool | None = None):
        self._total = total
        self._bar = None
        if sys.stderr.isatty() if terminal is None else terminal:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}"),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("compiling", total=total, completed=first)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the main metrics of a step."""
        text = summary(metrics)
        if self._bar is None:
            _log.info("step %d/%d: %s", step, self._total, text)
        elif "train/loss" in metrics:
            self._bar.update(self._task, description=text)
        else:
            self._bar.console.print(f"step {step}: {text}")


def summary(metrics: Mapping[str, float]) -> str:
    """Return the main metrics in words."""
    return ", ".join(text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics)
