# SPDX-License-Identifier: Apache-2.0
"""Toy runs for the tests of the trainer: a tiny model, a text file, steps in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.sharding import MeshConfig
from tests.parameters import drawn
from train import data, state
from train.config import CheckpointConfig, LogConfig, TrainConfig
from train.model_source import Custom
from train.objectives import LanguageModeling
from train.optim import AdamW, Constant
from train.step import Step

VOCAB = 260
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
)
UNROLLED = Execution(scan_layers=False)
"""Compiles fastest."""
WORDS = "the cat sat on the mat and the dog lay on the log while seven birds sang a song . "


def write_text(folder: Path) -> Path:
    """Write twenty short documents and return the file."""
    path = folder / "text.txt"
    path.write_text("<|end|>".join(WORDS * (n % 5 + 1) + str(n) for n in range(20)))
    return path


def run_config(text: Path, **changes: Any) -> TrainConfig:
    """Return a run of 20 steps on one device."""
    source = data.Text(paths=(str(text),), separator="<|end|>")
    base = TrainConfig(
        model=Custom(config=MODEL),
        data=data.DataConfig(sources=(source,), eval_fraction=0.1),
        execution=UNROLLED,
        mesh=MeshConfig(data=1),
        batch_size=4,
        seq_len=16,
        steps=20,
        schedule=Constant(learning_rate=3e-3),
        checkpoint=CheckpointConfig(interval=10),
        log=LogConfig(interval=3),
    )
    return replace(base, **changes)


def batch(seed: int = 0, rows: int = 8, length: int = 12) -> dict[str, jax.Array]:
    """Return a batch with two documents and padding in each row, and untargeted tokens."""
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, length), np.int32)
    segments[:, 5:] = 1
    segments[:, -1] = -1
    positions = np.concatenate([np.arange(5), np.arange(length - 6), [-1]])
    arrays = {
        "tokens": rng.integers(0, 256, (rows, length)).astype(np.int32),
        "positions": np.broadcast_to(positions, (rows, length)).astype(np.int32),
        "segment_ids": segments,
        "loss_mask": rng.random((rows, length)) < 0.8,
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def make_step(**changes: Any) -> Step:
    """Return a step on the toy model; `execution` and every field of `Step` may be changed."""
    execution = changes.pop("execution", UNROLLED)
    schedule = Constant(learning_rate=1e-2)
    base = Step(
        model=DecoderLM(MODEL, execution),
        objective=LanguageModeling(),
        optimizer=AdamW().build(),
        rate=lambda step: schedule.rate(step, 100),
    )
    return replace(base, **changes)


def init_params(model: DecoderLM, seed: int = 0) -> Any:
    """Return random parameters."""
    return drawn(model, seed)


def start(step: Step, seed: int = 0) -> state.TrainState:
    """Return the state at step 0."""
    params = init_params(step.model, seed)
    return state.create(params, step.optimizer, step.average)


def same_bytes(left: Any, right: Any) -> bool:
    """Return whether two trees hold identical bytes."""
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves)
