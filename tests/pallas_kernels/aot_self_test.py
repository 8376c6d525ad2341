# SPDX-License-Identifier: Apache-2.0
"""Cases that show the checker at work: programs within their budgets, and every check firing."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.aot import Case

ROWS, TILE, COLUMNS = 256, 64, 128
X = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)


def _add(a, b, out):
    out[...] = a[...] + b[...]


def _tpu_add(a, b, *, columns=COLUMNS):
    spec = pl.BlockSpec((TILE, columns), lambda i: (i, 0))
    call = pl.pallas_call(_add, out_shape=X, grid=(4,), in_specs=[spec, spec], out_specs=spec)
    return call(a, b)


def _add_rows(a, b, out):
    """Add in a loop, so that there is one to count the instructions of."""
    first = lax.axis_index("i") * TILE

    def step(index, carry):
        rows = pl.ds(first + index * 8, 8)
        out[rows, :] = a[rows, :] + b[rows, :]
        return carry

    lax.fori_loop(0, TILE // 8, step, None)


def _gpu_add(a, b):
    grid = ROWS // TILE
    return plgpu.kernel(_add_rows, out_type=X, grid=(grid,), grid_names=("i",))(a, b)


WIDE = jax.ShapeDtypeStruct((128, 256), jnp.float32)


def _gpu_too_wide(x):
    """Hold 256 numbers per thread until their maximum is known: more than it has registers."""

    def body(x_ref, out):
        values = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA, optimized=False)
        largest = lax.broadcast_in_dim(values.max(axis=1), values.shape, [0])
        out[...] = jnp.exp2(values - largest)

    return plgpu.kernel(body, out_type=WIDE, grid=(1,), grid_names=("i",))(x)


def _gpu_too_much_memory(x):
    def body(x_ref, out, scratch):
        scratch[0, :, :] = x_ref[...]
        out[...] = scratch[0, :, :]

    scratch = plgpu.SMEM((2, *WIDE.shape), jnp.float32)
    kernel = plgpu.kernel(
        body, out_type=WIDE, scratch_types=[scratch], grid=(1,), grid_names=("i",)
    )
    return kernel(x)


LARGE = jax.ShapeDtypeStruct((65536, 1024), jnp.float32)


def _materialised(x):
    """Write 256 MiB, more than any on-chip memory holds, before reading them again."""
    return lax.optimization_barrier(x + 1).sum(axis=0)


_TIMES = ("v5e",)
"""Where schedules, which take a process of their own, are left to the slow tests."""


def aot_cases() -> list[Case]:
    """Return programs that pass, then one for each check that must fire."""
    xla = Case("xla_add", lambda a, b: a + b, (X, X), max_temporaries=0)
    tpu = Case(
        "tpu_add",
        _tpu_add,
        (X, X),
        targets=("tpu",),
        slow=_TIMES,
        max_bundles=400,
        max_temporaries=0,
    )
    gpu = Case(
        "gpu_add",
        _gpu_add,
        (X, X),
        targets=("cuda",),
        max_registers=64,
        min_blocks_per_sm=8,
        max_sass_loop=200,
        max_temporaries=0,
    )
    wide = Case("gpu_spill_allowed", _gpu_too_wide, (WIDE,), targets=("cuda",), allow_spill=True)
    return [xla, tpu, gpu, wide, *_failing(tpu, gpu, wide)]


def _failing(tpu: Case, gpu: Case, wide: Case) -> list[Case]:
    change = dataclasses.replace
    narrow = lambda a, b: _tpu_add(a, b, columns=64)  # noqa: E731
    words = "bytes of temporaries, limit 0"
    return [
        Case("temporaries", _materialised, (LARGE,), max_temporaries=0, expect_failure=words),
        change(
            tpu,
            name="tpu_block_shape",
            fn=narrow,
            slow=False,
            max_bundles=None,
            expect_failure="divisible by 8 and 128",
        ),
        change(tpu, name="tpu_bundles", max_bundles=1, expect_failure="bundles, limit 1"),
        change(wide, name="gpu_spills", allow_spill=False, expect_failure=" spills "),
        change(
            wide,
            name="gpu_memory",
            fn=_gpu_too_much_memory,
            expect_failure="available shared memory",
        ),
        change(gpu, name="gpu_registers", max_registers=1, expect_failure="registers, limit 1"),
        change(
            gpu,
            name="gpu_loop",
            targets=("a100", "h100", "h200"),  # for others it is unrolled
            max_sass_loop=1,
            expect_failure="in a loop, limit 1",
        ),
        change(gpu, name="gpu_blocks", min_blocks_per_sm=33, expect_failure="at least 33 wanted"),
    ]
