# SPDX-License-Identifier: Apache-2.0
"""Write the golden checkpoint of the current format: `python -m tests.golden.make_checkpoint`.

Run it once per format version; `tests/faults/test_checkpoint.py` loads every folder
`tests/golden/checkpoint_v*` ever since.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sqzjax.io import manifest
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.lock import NAME
from sqzjax.io.step_files import FORMAT_VERSION

STEP = 7


def golden_items() -> dict[str, Any]:
    """Return small items with every kind of leaf, from formulas that need no random numbers."""
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 8
    params = {"layers": {"q": {"kernel": jnp.asarray(weights)}}, "head": jnp.arange(4.0)}
    train = {
        "step": jnp.int32(STEP),
        "half": jnp.asarray(weights, jnp.bfloat16),
        "codes": jnp.arange(-4, 4, dtype=jnp.int4),
        "key": jax.random.key(5),
        "count": 2**40,
    }
    return {"params": params, "opt_state": optax.adam(1e-3).init(params), "train": train}


def main() -> None:
    """Write `checkpoint_v<format version>` beside this file."""
    folder = Path(__file__).parent / f"checkpoint_v{FORMAT_VERSION}"
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(STEP, golden_items(), {"config": {"model": "golden"}})
    (folder / NAME).unlink()
    for marker in folder.rglob("commit_success.txt"):
        marker.write_text("success\n")  # orbax writes the absolute path of the folder there
    manifest.write(folder / str(STEP))


if __name__ == "__main__":
    main()
