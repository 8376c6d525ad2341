# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernel over packed caches, interpreted with the race detector on."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE, Target
from pallas_kernels.quantized_decode_attention import gpu_operands as operands
from pallas_kernels.quantized_decode_attention import (
    gpu_steps,
    gpu_tiles,
    quantized_decode_attention,
)
from pallas_kernels.quantized_decode_attention import mosaic_gpu as kernel
from pallas_kernels.quantized_decode_attention.form import form_of
from pallas_kernels.quantized_decode_attention.mosaic_gpu import Config
from pallas_kernels.quantized_decode_attention.shapes import SHAPES
from pallas_kernels.rotary import Rotary
from tests.pallas_kernels import aot_quantized_gpu as aot
from tests.pallas_kernels import packed, versions
from tests.pallas_kernels.packed import Packed
from tests.pallas_kernels.synchronisation import events, nth_call_dropped
from tests.tolerances import KERNEL_ATOL, LSE_ATOL

pytestmark = versions.interprets_gpu

HOPPER = Target("gpu", "NVIDIA H200", (9, 0), 132)
RESULTS = Path(kernel.__file__).parents[1] / "results"
SMALL = Config(64, 2, 1)
"""Two steps in flight: from the third on, buffers are overwritten."""


@pytest.fixture(autouse=True)
def clean_interpreter():
    yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


ROTARY = Rotary(tuple(1e4 ** (-np.arange(64) / 64)), 1.1)


def attend(keys, values, lengths, *, slots=256, rows=1, config=SMALL, window=None, **options):
    """Return the kernel's result and XLA's, of `rows` tokens that see ever more."""
    batch = len(lengths)
    k, v = keys.make((batch, 1, slots, 128), 1), values.make((batch, 1, slots, 128), 2)
    q = np.random.default_rng(0).standard_normal((batch, rows, 4, 128))
    length = jnp.asarray(lengths, jnp.int32)
    positions = length[:, None] - rows + jnp.arange(rows)
    given = {"length": length, "limits": jnp.maximum(positions + 1, 0)}
    if window:
        given["starts"] = positions - window
    if "rotary" in options:
        given["query_positions"] = jnp.maximum(positions, 0)
    arrays = (jnp.asarray(q, jnp.bfloat16), k, v, given)
    run = functools.partial(quantized_decode_attention, scale=0.1, **options)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    fixed = {"backend": "mosaic_gpu", "interpret": interpret, "config": config}
    got = jax.jit(lambda q, k, v, given: run(q, k, v, **given, **fixed))(*arrays)
    expected = jax.jit(lambda q, k, v, given: run(q, k, v, **given, backend="xla"))(*arrays)
    return jax.block_until_ready(got), expected


def compare(got, expected):
    np.testing.assert_allclose(got.out, expected.out, atol=KERNEL_ATOL["bfloat16"])
    np.testing.assert_allclose(got.lse, expected.lse, atol=KERNEL_ATOL["bfloat16"])
    empty = np.asarray(expected.lse) == MASK_VALUE
    assert not np.any(np.asarray(got.out)[empty])
    assert not gpu_callbacks.get_races().races_found


CASES = {
    "int4": (packed.INT4, packed.SYMMETRIC, [256, 0], {}),
    "int3_ring": (Packed(3), Packed(3), [900], {"config": Config(64, 3, 2), "window": 200}),
    "groups": (packed.INT4_GROUPS, packed.INT4_GROUPS, [200], {}),
    "kivi": (packed.KIVI_KEYS, packed.KIVI_VALUES, [250], {}),
    "kvquant3": (packed.NUQ_KEYS, packed.NUQ_VALUES, [900, 0], {"rotary": ROTARY, "rows": 4}),
    "static_int8": (Packed(8, "static"), Packed(8, "static"), [130], {"rows": 4}),
}
_NF4 = Packed(4, group=32, table=True)
_NF2 = Packed(2, group=64, table=True)
SLOW_CASES = {
    "kvquant4": (
        Packed(4, "static", table=True, exact=1),
        Packed(4, table=True, exact=1),
        [250],
        {"rotary": ROTARY, "config": Config(128, 2, 2), "window": 100},
    ),
    "kvquant2": (
        Packed(2, "static", table=True, exact=1),
        Packed(2, table=True, exact=3),
        [200],
        {"rows": 4},
    ),
    "uniform_before_rotation": (Packed(3), packed.INT8, [250], {"rotary": ROTARY}),
    "normal_float": (_NF4, _NF4, [250], {"softcap": 2.0}),
    "normal_float_pairs": (_NF2, _NF2, [250], {"rotary": ROTARY}),
    "derived_kvquant": (
        packed.NUQ_KEYS,
        packed.NUQ_VALUES,
        [1000, 3],
        {"slots": 1024, "config": None, "rotary": ROTARY},
    ),
    "int2": (Packed(2), Packed(2), [250], {"config": Config(128, 2, 1), "rows": 5}),
    "kivi_64": (Packed(4, "channel", 64), packed.INT4, [250], {}),
    "kivi_128": (Packed(2, "channel", 128), packed.INT4, [250], {"config": Config(128, 1, 1)}),
    "kivi_8_bits": (Packed(8, "channel", 32), packed.INT4, [250], {}),
    "kivi_symmetric": (Packed(4, "channel", 32, False, 7), packed.INT4, [250], {}),
    "pairs": (Packed(4, group=64), Packed(2, group=64), [250], {"softcap": 2.0}),
    "derived": (packed.INT4, packed.INT4, [1000, 3], {"slots": 1024, "config": None}),
}


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_equals_xla(name):
    keys, values, lengths, options = {**CASES, **SLOW_CASES}[name]
    compare(*attend(keys, values, lengths, **options))


def test_codes_without_rounded_queries_are_exact_to_the_scores():
    """Digits, their base and the scales: only weights are rounded, which the log-sum-exp is not."""
    got, expected = attend(packed.INT8, packed.INT4, [200])
    np.testing.assert_allclose(got.lse, expected.lse, atol=LSE_ATOL["bfloat16"])


@pytest.mark.parametrize(
    ("name", "dropped"), [("barrier_wait", 1), ("barrier_wait", 2), ("commit_smem", 1)]
)
@versions.detects_races
def test_a_missing_synchronisation_is_noticed(monkeypatch, name, dropped):
    nth_call_dropped(monkeypatch, name, dropped)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RACE DETECTED|no threads observed"):
        attend(packed.INT4, packed.INT4, [256])


def bare(rotary, target, **sizes):
    """Return the kernel as a function of its arrays; nothing of it runs."""
    return functools.partial(
        kernel.quantized_decode_attention_mosaic_gpu,
        query_positions=rotary and jnp.ones((1, 4), jnp.int32),
        rotary=rotary,
        scale=1.0,
        softcap=None,
        target=target,
        **sizes,
    )


def shapes_of(keys, values, slots, dtype="bfloat16"):
    """Return the shapes of those arrays, for four rows of one sequence and head."""
    q = jax.ShapeDtypeStruct((1, 1, 4, 128), dtype)
    rows = [jax.ShapeDtypeStruct(x, jnp.int32) for x in ((1,), (1, 2), (1, 4), (1, 4))]
    return q, *(x.struct((1, 1, slots, 128)) for x in (keys, values)), *rows


@pytest.mark.parametrize("form", ["as_they_are", "scaled", "turned"])
def test_products_are_ordered_with_what_they_read(form):
    """Queries and weights are committed between their write and their product.

    Interpretation runs products at once and so cannot notice a missing commit. Queries are written
    anew only after a commit, where warps meet, that follows the product with their predecessors.
    """
    keys, values = {
        "as_they_are": (packed.INT4, packed.INT4),
        "scaled": (packed.KIVI_KEYS, packed.KIVI_VALUES),
        "turned": (packed.NUQ_KEYS, packed.NUQ_VALUES),
    }[form]
    rotary = ROTARY if form == "turned" else None
    jaxpr = jax.make_jaxpr(bare(rotary, HOPPER, config=SMALL))(*shapes_of(keys, values, 256))
    found = [name for name, _ in itertools.groupby(events(jaxpr.jaxpr))]
    queries = [] if form == "as_they_are" else ["write", "commit"]
    scores = ["wait", *queries, "product", "wait for product", "write", "commit", "load"]
    weighted = ["wait", "product", "wait for product"]
    epilogue = ["write", "commit", "store", "wait for stores"]
    assert found == ["load", "wait", "[", *scores, *weighted, "]", *epilogue]


@pytest.mark.parametrize("name", ["newest", pytest.param("turns", marks=pytest.mark.slow)])
def test_a_wrong_turn_is_noticed(monkeypatch, name):
    """Slots of a ring taken for newer than they are, and tiles for their neighbours."""
    real = gpu_steps.scores if name == "newest" else operands.rotated_queries

    def scores(*args):
        return real(*args[:-1], args[-1] + 1)

    def rotated_queries(*args):
        found = real(*args)
        return found | {"turns": jnp.roll(found["turns"], 1, axis=0)}

    module = gpu_steps if name == "newest" else operands
    monkeypatch.setattr(module, real.__name__, scores if name == "newest" else rotated_queries)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(*attend(packed.NUQ_KEYS, packed.NUQ_VALUES, [900], rotary=ROTARY))


def test_a_wrong_base_is_noticed(monkeypatch):
    monkeypatch.setitem(gpu_tiles.BASE, 4, 127)
    real = gpu_steps._excess
    monkeypatch.setattr(gpu_steps, "_excess", lambda form, base: real(form, base) + 1)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(*attend(packed.INT4, packed.INT4, [100]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [gpu_tiles.key_order, gpu_tiles.value_order])
def test_every_channel_has_one_place(bits, order):
    assert sorted(order(bits)) == list(range(128))


@pytest.mark.parametrize(
    ("keys", "slots", "dtype", "target", "reason"),
    [
        (packed.INT4, 128, "bfloat16", Target("gpu", "A100", (8, 0), 108), "needs a Hopper GPU"),
        (packed.INT4, 128, "float32", HOPPER, "not float32"),
        (packed.INT4, 96, "bfloat16", HOPPER, "96 slots"),
        (Packed(6), 128, "bfloat16", HOPPER, "6 bits"),
        (Packed(4, group=16), 128, "bfloat16", HOPPER, "8 scales"),
        (Packed(4, "channel", 24), 192, "bfloat16", HOPPER, "groups of 24"),
        ("rotary", 128, "bfloat16", HOPPER, "before rotation of 8 bits"),
        (Packed(3, "channel", 32, table=True), 128, "bfloat16", HOPPER, "per group of tokens"),
        (Packed(3, table=True, exact=5), 128, "bfloat16", HOPPER, "5 exact entries"),
        (Packed(3, table=True, dtype="bfloat16"), 128, "bfloat16", HOPPER, "must be float16"),
    ],
)
def test_what_the_kernel_cannot_do_is_not_implemented(keys, slots, dtype, target, reason):
    rotary = None
    if keys == "rotary":
        keys, rotary = packed.INT8, Rotary(tuple(np.ones(64)))
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: .*{reason}"):
        jax.eval_shape(bare(rotary, target), *shapes_of(keys, packed.INT4, slots, dtype))


@pytest.mark.parametrize(
    "keys", [packed.INT8, packed.INT4_GROUPS, packed.KIVI_KEYS, packed.NUQ_KEYS]
)
@pytest.mark.parametrize("values", [packed.INT8, packed.KIVI_VALUES, packed.NUQ_VALUES])
def test_derived_sizes_fit(keys, values):
    shape = (1, 8, 8192, 128)
    forms = [form_of(form.struct(shape), "mosaic_gpu") for form in (keys, values)]
    for rows in (1, 4, 64):
        rotated = keys is packed.NUQ_KEYS
        tile = kernel.row_tile(rows, *forms, rotated)
        plan = kernel.Plan(Config(), 8192, tile, *forms, rotated, 1.0, None, None)
        config = kernel.default_config(1, 8, -(-rows // tile), plan, HOPPER)
        plan = dataclasses.replace(plan, config=config)
        assert 2 * kernel.shared_bytes(plan) <= kernel.SHARED_BYTES, "two blocks must be resident"


@pytest.mark.parametrize("name", aot.VARIANTS)
def test_shared_memory_is_that_of_the_compiled_kernel(name):
    record = json.loads((RESULTS / "compiled_h200.json").read_text())
    (compiled,) = [row for row in record if row["name"] == f"quantized_{name}"]
    shape, rows, keys, values = aot.VARIANTS[name]
    size, rotated = SHAPES[shape], name.startswith("kvquant")
    cache = (size.batch, size.kv_heads, size.slots, size.head_dim)
    forms = [form_of(form.struct(cache), "mosaic_gpu") for form in (keys, values)]
    tile = kernel.row_tile(rows, *forms, rotated)
    plan = kernel.Plan(Config(), size.slots, tile, *forms, rotated, 1.0, None, None)
    config = kernel.default_config(size.batch, size.kv_heads, -(-rows // tile), plan, HOPPER)
    plan = dataclasses.replace(plan, config=config)
    assert kernel.shared_bytes(plan) == compiled["shared_memory"]


@pytest.mark.parametrize("exact", [1, 2, 3])
@pytest.mark.parametrize("block_kv", [64, 128])
def test_loads_are_written_where_tma_may_write(exact, block_kv):
    """To multiples of 128 bytes; places of single exact entries are 64 bytes a tile."""
    v = Packed(3, table=True, exact=exact).struct((1, 2, 512, 128))
    form = form_of(v, "mosaic_gpu")
    plan = kernel.Plan(Config(block_kv), 512, 8, form, form, False, 1.0, None, None)
    arrays = jax.eval_shape(lambda v: operands.cache("v", v, form), v)
    assert set(arrays) == {f"v.{x}" for x in ("codes", "scale", "offset", "residual", "place")}
    for name, array in arrays.items():
        stages, *each = operands.ring_shape(plan, name, array)
        assert stages == 3 and array.dtype.itemsize * math.prod(each) % 128 == 0
        assert each[0] >= operands.lines_of_block(plan, name, array)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="block_kv=96"):
        Config(96)
    with pytest.raises(ValueError, match="stages=0"):
        Config(64, 0)
    with pytest.raises(ValueError, match="lower its stages"):
        attend(packed.INT8, packed.INT8, [5], config=Config(64, 20))
