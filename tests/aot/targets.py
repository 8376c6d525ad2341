# SPDX-License-Identifier: Apache-2.0
"""The devices that can be compiled for, what compiling for them needs, and how jax is told.

Imports no jax, so that the environment of a compiling process can be set before jax reads it.
"""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

PLATFORMS = ("cuda", "tpu")


@dataclass(frozen=True)
class Tpu:
    """A TPU generation: the smallest topology of libtpu, jax's device kind, cores of a device."""

    topology: str
    kind: str
    cores: int


@dataclass(frozen=True)
class Gpu:
    """What XLA and Mosaic GPU ask of a device (figures of XLA's own target descriptions)."""

    kind: str
    capability: tuple[int, int]
    accelerated: bool  # sm_90a, which has wgmma, rather than sm_90
    cores: int
    lanes: int  # of float32 per core
    bandwidth: int  # bytes per second
    l2_bytes: int
    clock_ghz: float
    memory: int
    shared_per_core: int
    shared_per_block: int


TPUS = {
    "v4": Tpu("v4:2x2x1", "TPU v4", 1),
    "v5e": Tpu("v5e:2x2", "TPU v5 lite", 1),
    "v5p": Tpu("v5p:2x2x1", "TPU v5", 2),
    "v6e": Tpu("v6e:2x2", "TPU v6 lite", 1),
}
GPUS = {
    "a100": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        accelerated=False,
        cores=108,
        lanes=64,
        bandwidth=2_039_040_000_000,
        l2_bytes=41_943_040,
        clock_ghz=1.41,
        memory=85_100_068_864,
        shared_per_core=167_936,
        shared_per_block=166_912,
    ),
    "h100": Gpu(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        accelerated=True,
        cores=132,
        lanes=128,
        bandwidth=3_352_320_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
        memory=84_942_979_072,
        shared_per_core=233_472,
        shared_per_block=232_448,
    ),
    "h200": Gpu(
        kind="NVIDIA H200",
        capability=(9, 0),
        accelerated=True,
        cores=132,
        lanes=128,
        bandwidth=4_800_000_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
        memory=151_397_597_184,
        shared_per_core=233_472,
        shared_per_block=232_448,
    ),
    "b200": Gpu(
        kind="NVIDIA B200",
        capability=(10, 0),
        accelerated=True,
        cores=148,
        lanes=128,
        bandwidth=7_672_320_000_000,
        l2_bytes=132_644_864,
        clock_ghz=1.965,
        memory=191_514_411_008,
        shared_per_core=233_472,
        shared_per_block=232_448,
    ),
}
NAMES = (*TPUS, *GPUS)
DEFAULT = ("v5e", "v6e", "h100", "h200", "a100")

REGISTERS_PER_CORE = 65536
THREADS_PER_CORE = 2048
BLOCKS_PER_CORE = 32
RESERVED_SHARED = 1024
"""Bytes of shared memory that CUDA takes for itself in every block."""


def platform_of(target: str) -> str:
    """Return "tpu" or "cuda"."""
    return "tpu" if target in TPUS else "cuda"


def gpu_description(name: str) -> str:
    """Return the text proto `stream_executor.GpuTargetConfigProto` of a GPU."""
    gpu = GPUS[name]
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_per_core} threads_per_core_limit: {THREADS_PER_CORE}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {extension}
  }}
  registers_per_core_limit: {REGISTERS_PER_CORE} registers_per_block_limit: 65536
  device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.kind}"
"""


def blocks_per_core(target: str, *, registers: int, shared_memory: int, threads: int) -> int:
    """Return how many blocks of a kernel a streaming multiprocessor holds at a time."""
    by_registers = REGISTERS_PER_CORE // (-(-registers // 8) * 8 * threads)
    by_memory = GPUS[target].shared_per_core // (shared_memory + RESERVED_SHARED)
    return min(by_registers, by_memory, THREADS_PER_CORE // threads, BLOCKS_PER_CORE)


def has_module(name: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def missing_support(target: str) -> str | None:
    """Return what must be installed to compile for a target, or None."""
    if platform_of(target) == "tpu":
        if has_module("libtpu"):
            return None
        return "the TPU compiler is not installed; pip install 'sqzjax[aot-tpu]'"
    if has_module("jax_plugins.xla_cuda13") or has_module("jax_plugins.xla_cuda12"):
        return None
    return "the CUDA compiler is not installed; `make aot-cuda` makes an environment that has it"


def find_tool(name: str) -> str | None:
    """Return the path of ptxas or nvdisasm: from the CUDA wheels, else from PATH."""
    for base in filter(None, sys.path):
        for folder in ("nvidia/cu13/bin", "nvidia/cuda_nvcc/bin", "nvidia/cu12/bin"):
            path = Path(base, folder, name)
            if os.access(path, os.X_OK):
                return str(path)
    return shutil.which(name)


def environment(target: str, work: Path, *, lower_only: bool) -> dict[str, str]:
    """Return the variables of a process that compiles for `target` and dumps below `work`."""
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        # A kept program would not be compiled again, and so write no dump.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        # Without it a second process that loads libtpu fails on a lock file.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    if platform_of(target) == "cuda" and not lower_only:
        # The emitter filter makes XLA write the PTX of its own and of Triton kernels; any other
        # pattern makes compilation many times slower.
        env["XLA_FLAGS"] = f"--xla_dump_to={work / 'xla'} --xla_dump_emitter_re=ptx"
        env["MOSAIC_GPU_DUMP_TO"] = str(work / "mosaic")
        for what in ("PTX", "PTXAS", "RESOURCES"):
            env[f"MOSAIC_GPU_DUMP_{what}"] = "1"
    return env
