# SPDX-License-Identifier: Apache-2.0
"""Lower and compile one case for a described device, in this process.

Lowering needs jax alone. Compiling needs the wheels of the target and `targets.environment`, set
before jax was imported; a code generator may abort the process, so it belongs into a child.
"""

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tests.aot import dumps, targets
from tests.aot.cases import Case, Record, judge, judge_expectation

Lower = Callable[[Case], Any]


def lower_only(name: str, case: Case, target: str) -> Record:
    """Return the record of tracing and lowering a case; no wheel of the target is needed."""
    values, _ = _lowered(case, lowerer(target))
    record = Record(name, target, ok="error" not in values, **values)
    return judge_expectation(case, record, lower_only=True)


def compile_case(
    name: str, case: Case, target: str, lower: Lower, work: Path, *, schedule: bool
) -> Record:
    """Return the judged record of compiling a case; `lower` comes from `lowerer`."""
    # A kernel that an earlier case compiled would be taken from a cache, and so not be dumped.
    jax.clear_caches()
    before = dumps.present(work)
    values, lowered = _lowered(case, lower)
    if lowered is not None:
        try:
            start = time.perf_counter()
            compiled = lowered.compile(compiler_options=dict(case.options or {}) or None)
            values["compile_seconds"] = time.perf_counter() - start
            values |= _sizes(compiled)
            if targets.platform_of(target) == "cuda":
                values["kernels"] = dumps.cuda_kernels(target, work, before)
            elif schedule:
                values["kernels"] = dumps.tpu_kernels(work, before, compiled.as_text())
        except Exception as error:  # every failure of a case is a result
            values["error"] = _message(error)
    return judge(case, Record(name, target, **values))


def lowerer(target: str, topology: Any = None) -> Lower:
    """Return what lowers a case for a target, placed on a device of `topology` if that is given.

    Kernels choose by the device that the abstract mesh describes, as they do on the device.
    """
    mesh = _describe(target)
    sharding = None
    if topology is not None:
        devices = np.array(topology.devices[:1])
        # With explicit axes tracing would compare this mesh with the describing one and fail.
        place = Mesh(devices, ("aot",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(place, PartitionSpec())

    def structure(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)

    def lower(case: Case) -> Any:
        arguments = jax.tree.map(structure, case.args)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(case.fn, donate_argnums=case.donate).trace(*arguments)
            return traced.lower(lowering_platforms=(targets.platform_of(target),))

    return lower


def topology_of(target: str) -> Any:
    """Return the compile-only devices of a target; its wheels must be installed."""
    if targets.platform_of(target) == "tpu":
        name = targets.TPUS[target].topology
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology="1x1x1",
        target_config=targets.gpu_description(target),
    )


def _describe(target: str) -> AbstractMesh:
    if targets.platform_of(target) == "tpu":
        tpu = targets.TPUS[target]
        device = AbstractDevice(device_kind=tpu.kind, num_cores=tpu.cores, platform="tpu")
    else:
        gpu = targets.GPUS[target]
        capability = ".".join(map(str, gpu.capability))

        class Device(AbstractDevice):
            # Mosaic GPU reads it; where it is missing, Hopper is assumed.
            compute_capability = property(lambda self: capability)

        device = Device(device_kind=gpu.kind, num_cores=gpu.cores, platform="gpu")
    return AbstractMesh((1,), ("aot",), (AxisType.Auto,), abstract_device=device)


def _lowered(case: Case, lower: Lower) -> tuple[dict[str, Any], Any]:
    start = time.perf_counter()
    try:
        lowered = lower(case)
    except Exception as error:
        return {"error": _message(error)}, None
    return {"lower_seconds": time.perf_counter() - start}, lowered


def _sizes(compiled: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"copied": largest_copy(compiled.as_text())}
    memory = compiled.memory_analysis()
    if memory is not None:
        values["temporaries"] = memory.temp_size_in_bytes
        values["arguments"] = memory.argument_size_in_bytes
        values["outputs"] = memory.output_size_in_bytes
    try:
        cost = compiled.cost_analysis() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        cost = {}  # the compile-only client of CUDA has none
    values["flops"] = cost.get("flops")
    values["bytes_accessed"] = cost.get("bytes accessed")
    return values


def largest_copy(program: str) -> int:
    """Return the elements of the largest array that a compiled program's text copies, or 0.

    Copies into fast memory, which XLA schedules for TPUs (`copy-start`), are not among them.
    """
    found = re.finditer(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose)\(", program)
    sizes = (math.prod(int(n) for n in match[1].split(",") if n) for match in found)
    return max(sizes, default=0)


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:4000]
