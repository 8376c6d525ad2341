# SPDX-License-Identifier: Apache-2.0
"""Compile one program of a plan for chips that are not there, in a process of its own.

`python -m eval.plan_compile REQUEST.json RESULT.json`, started by `eval.plan` because libtpu reads
its environment once and a compiler that fails may take its process along. Parameters, optimizer
state and caches are shapes with shardings: nothing is allocated, whatever the model's size.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from eval.plan_config import DecodeProgram, PlanConfig, TrainProgram, architecture_of
from eval.train_step import adamw_step
from sqzjax import config as configs
from sqzjax import kvcache, sharding
from sqzjax.analysis import hlo
from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.typing import PyTree

_NO_ROOM = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Program:
    """A function with abstract, placed arguments; `parts` names the trees whose bytes to report."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    donate: tuple[int, ...]
    parts: dict[str, PyTree]


def topology_mesh(config: PlanConfig, mesh: Any) -> Mesh:
    """Return the mesh over the chips of the topology; ValueError when they cannot form it."""
    options = {"chip_config_name": "megacore"} if config.topology.startswith("v4") else {}
    try:
        chips = topologies.get_topology_desc(
            platform="tpu", topology_name=config.topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={config.topology!r} is refused by libtpu: {error}") from None
    try:
        return sharding.make_mesh(mesh, chips)
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"mesh {mesh} does not lie on the torus {config.topology}; let every axis be a product "
            f"of the torus's sizes ({error})"
        ) from None


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
    """Return the decode step on `mesh`, in the unrolled layout that decoding uses."""
    sharding.check_batch(settings.batch_size, mesh)
    execution = Execution(dtype=settings.dtype, param_dtype=settings.dtype, scan_layers=False)
    model = DecoderLM(shape, execution)
    params = model.abstract_params()
    caches = jax.eval_shape(
        lambda: model.init_caches(
            kvcache.Dense(), batch=settings.batch_size, capacity=settings.context, max_new=1
        )
    )
    rows = sharding.batch_sharding(mesh)
    placed_caches = sharding.cache_shardings(caches, mesh, shape.num_kv_heads)
    tokens = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32, sharding=rows)
    parts = {
        "parameters": place(params, sharding.shardings(params, mesh)),
        "cache": place(caches, placed_caches),
    }

    def step(params: PyTree, caches: Any, tokens: Any) -> tuple[Any, Any]:
        positions = caches.length[:, None]
        out = model.forward(params, tokens[:, None], positions=positions, caches=caches)
        assert out.logits is not None
        return jnp.argmax(out.logits[:, 0], axis=-1).astype(jnp.int32), out.caches

    return Program(
        step, (*parts.values(), tokens), (rows, placed_caches), (1,), parts | {"batch": tokens}
    )


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """Return the shapes of a tree with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def device_bytes(tree: PyTree) -> int:
    """Return the bytes of a tree of placed shapes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compile_program(program: Program, mesh: Mesh) -> dict[str, Any]:
    """Lower and compile; return what XLA says of the result, or that it does not fit."""
    began = time.perf_counter()
    jitted = jax.jit(
        program.function, out_shardings=program.out_shardings, donate_argnums=program.donate
    )
    result: dict[str, Any] = {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "bytes": {name: device_bytes(tree) for name, tree in program.parts.items()},
    }
    with jax.set_mesh(mesh):
        lowered = jitted.trace(*program.arguments).lower(lowering_platforms=("tpu",))
        result["lower_seconds"] = time.perf_counter() - began
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if _NO_ROOM not in str(error):
                raise
            return result | {"status": "too large", "error": str(error)[:2000]}
    result["compile_seconds"] = time.perf_counter() - began - result["lower_seconds"]
    return result | {"status": "ok"} | _read(compiled, mesh)


def _read(compiled: Any, mesh: Mesh) -> dict[str, Any]:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    module = hlo.parse(compiled.as_text())
    steps = module.collectives()
    coordinates = [device.coords for device in mesh.devices.flat]
    return {
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
            "peak": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        },
        "xla_flops": cost.get("flops"),
        "xla_bytes": cost.get("bytes accessed"),
        "collectives": [asdict(step) | {"axes": _axes(step, coordinates)} for step in steps],
        "unknown_loops": module.unknown_loops,
    }


def _axes(step: hlo.Collective, coordinates: list[tuple[int, ...]]) -> int:
    """Return along how many axes of the torus the devices of a step lie; a permute uses one."""
    if step.kind == "collective-permute":
        return 1
    places = [coordinates[device] for device in step.group]
    return max(1, sum(len(set(axis)) > 1 for axis in zip(*places)))


def main(request: Path, result: Path) -> None:
    """Compile what `request` names and write `result`; a bad request is a result, too."""
    asked = json.loads(request.read_text())
    config = configs.load(PlanConfig, asked["config"])
    shape = architecture_of(config.models[asked["model"]])
    train = asked["phase"] == "train"
    try:
        settings: Any = config.train if train else config.decode
        mesh = topology_mesh(config, settings.mesh)
        program = (train_program if train else decode_program)(shape, settings, mesh)
    except ValueError as error:
        outcome = {"status": "bad config", "error": str(error)}
    else:
        outcome = compile_program(program, mesh)
    result.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
