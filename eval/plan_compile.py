# SPDX-License-Identifier: Apache-2.0
"""The programs of a capacity plan, compiled in a process of its own.

`python -m eval.plan_compile REQUEST.json RESULT.json`, started by `eval.plan`. Parameters,
optimizer state and caches are shapes with shardings (`sqzjax.analysis.aot`).
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from eval.plan_config import DecodeProgram, PlanConfig, TrainProgram, architecture_of
from eval.train_step import adamw_step
from sqzjax import config as configs
from sqzjax import kvcache, sharding
from sqzjax.analysis.aot import Program, answer, place, topology_mesh
from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.typing import PyTree


def train_program(shape: ModelConfig, settings: TrainProgram, mesh: Mesh) -> Program:
    """Return the training step on `mesh`."""
    sharding.check_batch(settings.batch_size, mesh)
    execution = Execution(
        dtype=settings.dtype, param_dtype=settings.param_dtype, remat=settings.remat
    )
    model = DecoderLM(shape, execution)
    optimizer, step = adamw_step(model)
    params = model.abstract_params()
    placed = sharding.shardings(params, mesh)
    state = jax.eval_shape(optimizer.init, params)
    placed_state = sharding.mirror_shardings(state, params, placed, mesh)
    tokens = jax.ShapeDtypeStruct(
        (settings.batch_size, settings.seq_len + 1),
        jnp.int32,
        sharding=sharding.batch_sharding(mesh),
    )
    parts = {"parameters": place(params, placed), "optimizer": place(state, placed_state)}
    return Program(
        step,
        (*parts.values(), tokens),
        (placed, placed_state),
        (0, 1),
        parts | {"batch": tokens},
    )


def decode_program(shape: ModelConfig, settings: DecodeProgram, mesh: Mesh) -> Program:
    """Return the decode step on `mesh`, in the unrolled layout that decoding uses.

    It writes the keys of `queries` new tokens per row, attends and predicts them all.
    """
    sharding.check_batch(settings.batch_size, mesh)
    execution = Execution(dtype=settings.dtype, param_dtype=settings.dtype, scan_layers=False)
    model = DecoderLM(shape, execution)
    params = model.abstract_params()
    caches = jax.eval_shape(
        lambda: model.init_caches(
            kvcache.Dense(),
            batch=settings.batch_size,
            capacity=settings.context,
            max_new=settings.queries,
        )
    )
    rows = sharding.batch_sharding(mesh)
    placed_caches = sharding.cache_shardings(caches, mesh, shape.num_kv_heads)
    tokens = jax.ShapeDtypeStruct((settings.batch_size, settings.queries), jnp.int32, sharding=rows)
    parts = {
        "parameters": place(params, sharding.shardings(params, mesh)),
        "cache": place(caches, placed_caches),
    }

    def step(params: PyTree, caches: Any, tokens: Any) -> tuple[Any, Any]:
        positions = caches.length[:, None] + jnp.arange(settings.queries, dtype=jnp.int32)
        out = model.forward(params, tokens, positions=positions, caches=caches)
        assert out.logits is not None
        return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), out.caches

    return Program(
        step, (*parts.values(), tokens), (rows, placed_caches), (1,), parts | {"batch": tokens}
    )


def build(request: dict[str, Any]) -> tuple[Program, Mesh]:
    """Return the program that a request of `eval.plan` names, and the mesh it runs on."""
    config = configs.load(PlanConfig, request["config"])
    shape = architecture_of(config.models[request["model"]])
    train = request["phase"] == "train"
    settings: Any = config.train if train else config.decode
    mesh = topology_mesh(config.topology, settings.mesh)
    return (train_program if train else decode_program)(shape, settings, mesh), mesh


if __name__ == "__main__":
    answer(*map(Path, sys.argv[1:]), build=build)
