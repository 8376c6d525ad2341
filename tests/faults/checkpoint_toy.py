# SPDX-License-Identifier: Apache-2.0
"""A run small enough to kill many times: `python -m tests.faults.checkpoint_toy DIR STEPS`.

It resumes from the newest intact step, saves every step in the background with donated buffers,
prints the step before each save, and finally writes its parameters to `DIR/final.npy`.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sqzjax.io.checkpoint import Checkpointer

OPTIMIZER = optax.adam(1e-2)


def init_state(size: int = 16, key: int = 0) -> dict[str, Any]:
    """Return items as a trainer has them: nested parameters, optimizer tuples, counters."""
    rng = np.random.default_rng(key)
    params = {
        "embed": {"embedding": rng.normal(size=(size, 8)).astype(np.float32)},
        "layers": {"mlp": {"kernel": rng.normal(size=(2, 8, 8)).astype(np.float32)}},
        "head": {"kernel": rng.normal(size=(8, size)).astype(jnp.bfloat16)},
    }
    params = jax.device_put(params)
    train = {"step": jnp.int32(0), "ema": jax.tree.map(jnp.copy, params["layers"])}
    return {"params": params, "opt_state": OPTIMIZER.init(params), "train": train}


def abstract(items: Any) -> Any:
    """Return shapes and dtypes of `items` without placement."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)


@jax.jit(donate_argnums=0)
def train_step(items: dict[str, Any]) -> dict[str, Any]:
    """Make one deterministic update whose batch depends on the step alone."""
    step = items["train"]["step"]
    batch = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (4, 8))

    def loss(params):
        hidden = batch
        for layer in range(2):
            hidden = jnp.tanh(hidden @ params["layers"]["mlp"]["kernel"][layer])
        logits = hidden @ params["head"]["kernel"].astype(jnp.float32)
        return jnp.mean(jnp.square(logits @ params["embed"]["embedding"]))

    gradients = jax.grad(loss)(items["params"])
    updates, opt_state = OPTIMIZER.update(gradients, items["opt_state"])
    params: Any = optax.apply_updates(items["params"], updates)
    ema = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, items["train"]["ema"], params["layers"]
    )
    return {"params": params, "opt_state": opt_state, "train": {"step": step + 1, "ema": ema}}


def digest(items: Any) -> bytes:
    """Return all bytes of all leaves, for exact comparison."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(items))


def run(folder: Path, steps: int, keep: int = 2) -> None:
    """Train to `steps`, resuming from what `folder` holds."""
    items = init_state()
    with Checkpointer(folder / "checkpoints", keep=keep) as checkpointer:
        start = 0
        if checkpointer.latest_good() is not None:
            restored = checkpointer.restore(None, abstract(items))
            items, start = restored.items, restored.step
        for step in range(start + 1, steps + 1):
            items = train_step(items)
            print(f"step {step}", flush=True)
            checkpointer.save(step, items, {"step": step})
    (folder / "final.npy").write_bytes(digest(items))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
