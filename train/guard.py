# SPDX-License-Identifier: Apache-2.0
"""Keep non-finite steps out of the state, and stop a run that produces nothing else.

The decision is taken on the device, inside the step, so it costs no synchronisation; the host
learns of it when the metrics arrive, a step later.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.typing import Array, Bool, PyTree

EXIT_NONFINITE = 3
"""Exit code of a run whose loss, gradients or updates stayed non-finite."""

_log = logging.getLogger(__name__)


def select(accept: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """Return `new` if `accept`, else `old` to the byte; XLA fuses it into the update."""
    return jax.tree.map(lambda n, o: jnp.where(accept, n, o), new, old)


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Return, on the device, whether every number of a tree is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def all_finite(tree: PyTree) -> bool:
    """Return whether every number of a tree is finite; copies it to the host leaf by leaf."""
    return all(bool(np.isfinite(np.asarray(leaf)).all()) for leaf in jax.tree.leaves(tree))


class Guard:
    """Count rejected steps in a row and record their batches in `bad_batches.jsonl`."""

    def __init__(self, path: Path, max_bad_steps: int, batch_size: int):
        self._path, self._limit, self._batch_size = path, max_bad_steps, batch_size
        self.last_good = 0
        """Newest step known to be accepted: batches consumed up to and including it."""

    def observe(self, step: int, metrics: dict[str, Any]) -> bool:
        """Take the host metrics of the step that ended at `step`; return whether to stop."""
        in_row = int(metrics["rejected_in_row"])
        if not in_row:
            self.last_good = step
            return False
        first = (step - 1) * self._batch_size
        record = {
            "step": step,
            "rows": [first, first + self._batch_size],
            "loss": str(float(metrics["loss"][0])),
            "grad_norm": str(float(metrics["grad_norm"])),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        known = all(math.isfinite(float(record[name])) for name in ("loss", "grad_norm"))
        overflow = ", but the update overflows" if known else ""
        _log.warning(
            "step %d rejected: loss sum %s, gradient norm %s%s (%d in a row)",
            step, record["loss"], record["grad_norm"], overflow, in_row,
        )  # fmt: skip
        return in_row >= self._limit
