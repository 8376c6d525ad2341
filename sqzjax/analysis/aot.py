# SPDX-License-Identifier: Apache-2.0
"""Compile a program for TPU chips that are not there, and read what XLA says of it.

Runs in a process of its own, started by `sqzjax.analysis.topology.compile_in_child`. Arguments are
shapes with shardings: nothing is allocated, whatever the model's size.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sqzjax import sharding
from sqzjax.analysis import hlo
from sqzjax.sharding import MeshConfig
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


def topology_mesh(topology: str, mesh: MeshConfig) -> Mesh:
    """Return the mesh over the chips of a topology; ValueError when they cannot form it."""
    options = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    try:
        chips = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology={topology!r} is refused by libtpu: {error}") from None
    try:
        return sharding.make_mesh(mesh, chips)
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"mesh {mesh} does not lie on the torus {topology}; let every axis be a product "
            f"of the torus's sizes ({error})"
        ) from None


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


def answer(
    request: Path, result: Path, build: Callable[[dict[str, Any]], tuple[Program, Mesh]]
) -> None:
    """Compile what `build` makes of a request and write the result; a bad request is one, too."""
    try:
        program, mesh = build(json.loads(request.read_text()))
    except ValueError as error:
        outcome = {"status": "bad config", "error": str(error)}
    else:
        outcome = compile_program(program, mesh)
    result.write_text(json.dumps(outcome))


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
