# SPDX-License-Identifier: Apache-2.0
"""Arrays of reference files."""

from pathlib import Path

import numpy as np


def load(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays of an npz file, which is closed again: a leak fails whatever runs next."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
