# SPDX-License-Identifier: Apache-2.0
"""`quantized_decode_attention` through XLA: against float64 attention to the decoded elements."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.qtensor import dequantize
from pallas_kernels.quantized_decode_attention import folded, quantized_decode_attention
from pallas_kernels.quantized_decode_attention import xla as xla_path
from pallas_kernels.rotary import Rotary
from sqzjax.analysis import hlo
from sqzjax.kvcache import KIVI, Quantized
from sqzjax.models import DecoderLM, Execution, ModelConfig
from tests.pallas_kernels import reference
from tests.pallas_kernels.packed import Packed
from tests.tolerances import KERNEL_ATOL, LSE_ATOL, MERGE

KV_HEADS, WIDTH, SLOTS = 2, 32, 40
INVERSE = tuple(float(x) for x in 1e4 ** -(np.arange(WIDTH // 2) / (WIDTH // 2)))
run = jax.jit(quantized_decode_attention, static_argnames=("scale", "softcap", "rotary"))
run_dequantize = jax.jit(dequantize)

# Keys, values, and whether the products of each are folded where the rows are few.
FORMS = {
    "int8": (Packed(8), Packed(8), True, True),
    "int6_groups": (Packed(6, group=16), Packed(6, group=16), True, True),
    "int4_symmetric": (*[Packed(4, offset=False, bias=7)] * 2, True, True),
    "kivi3": (Packed(3, "channel", 8), Packed(3, group=8), True, True),
    "kivi2": (Packed(2, "channel", 8), Packed(2, group=16), True, True),
    "int1_static": (Packed(1, "static"), Packed(1), True, True),
    "channel_values": (Packed(4, "channel", 4), Packed(4, "channel", 8), False, False),
    "narrow_groups": (Packed(8, group=2), Packed(8, group=4), False, False),
    "table": (Packed(3, "static", table=True), Packed(4, table=True), False, False),
    "slots": (Packed(2, "static", exact=2), Packed(2, exact=3), False, False),
}
# Tokens and queries of a kv head, folded up to 16 rows; whether sequences are taken one by one.
ROWS = [(1, 1, False), (1, 2, True), (3, 2, False), (9, 2, True)]


def decode(tensor):
    return np.asarray(run_dequantize(tensor))


def packed(name, batch=2, slots=SLOTS, width=WIDTH):
    keys, values = FORMS[name][:2]
    shape = (batch, KV_HEADS, slots, width)
    return keys.make(shape, 1), values.make(shape, 2)


def queries(tokens, group, batch=2, width=WIDTH):
    shape = (batch, tokens, KV_HEADS * group, width)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def compare(got, expected):
    np.testing.assert_allclose(got.out, expected[0], atol=KERNEL_ATOL["float32"])
    np.testing.assert_allclose(got.lse, expected[1], atol=LSE_ATOL["float32"])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("tokens", "group", "alone"), ROWS)
def test_any_range_of_positions_equals_the_definition(monkeypatch, name, tokens, group, alone):
    """Rings, windows, ragged and empty rows; several tiles, the last of which reaches back."""
    monkeypatch.setattr(xla_path, "BLOCK", 16)
    monkeypatch.setattr(xla_path, "_ALONE", 0 if alone else 1 << 20)
    k, v = packed(name)
    q = queries(tokens, group)
    rows = tokens * group
    assert folded.suits_keys(k, rows) == (rows <= folded.FEW and FORMS[name][2])
    assert folded.suits_values(v, rows) == (rows <= folded.FEW and FORMS[name][3])
    decoded = [decode(x) for x in (k, v)]
    bounds = st.lists(st.integers(-2, 3 * SLOTS), min_size=2 * tokens, max_size=2 * tokens)
    fixed = {"scale": 0.3, "softcap": 4.0 if group == 1 else None}

    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(0, 3 * SLOTS), min_size=2, max_size=2), bounds, bounds)
    def check(length, starts, limits):
        length = np.array(length, np.int32)
        starts, limits = (np.array(x, np.int32).reshape(2, tokens) for x in (starts, limits))
        got = run(q, k, v, length=length, starts=starts, limits=limits, **fixed)
        expected = reference.decode_attention(q, *decoded, length, starts, limits, **fixed)
        compare(got, expected)

    check()


@pytest.mark.parametrize("width", [20, 48, 80])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_that_do_not_fill_their_words(bits, width):
    form = Packed(bits)
    k, v = (form.make((2, KV_HEADS, 19, width), seed) for seed in (1, 2))
    q = queries(1, 2, width=width)
    length = np.array([19, 7], np.int32)
    limits = length[:, None]
    got = run(q, k, v, length=length, limits=limits)
    decoded = [decode(x) for x in (k, v)]
    scale = 1 / math.sqrt(width)
    expected = reference.decode_attention(q, *decoded, length, 0 * limits, limits, scale=scale)
    compare(got, expected)


@pytest.mark.parametrize(("name", "alone"), [("kivi3", False), ("slots", True), ("table", True)])
@pytest.mark.parametrize("length", [[40, 13], [95, 41], [1_000_003, 0]])
def test_keys_before_rotation_are_turned_to_their_positions(monkeypatch, name, alone, length):
    monkeypatch.setattr(xla_path, "BLOCK", 16)
    monkeypatch.setattr(xla_path, "_ALONE", 0 if alone else 1 << 20)
    tokens, group = 3, 2
    k, v = packed(name)
    q = queries(tokens, group)
    length = np.array(length, np.int32)
    at = np.maximum(length[:, None] - tokens + np.arange(tokens), 0)
    limits = np.minimum(at + 1, length[:, None]).astype(np.int32)
    starts = np.maximum(length - SLOTS, 0)[:, None].repeat(tokens, 1)
    rotary = Rotary(INVERSE, 1.25)
    got = run(
        q,
        k,
        v,
        length=length,
        starts=starts,
        limits=limits,
        query_positions=at.astype(np.int32),
        rotary=rotary,
        scale=0.3,
    )
    held = np.maximum(length[:, None], 1) - 1
    held = held - (held - np.arange(SLOTS)) % SLOTS
    keys = turned(np.asarray(decode(k), np.float64), held[:, None], rotary)
    turned_q = turned(np.asarray(q, np.float64), at[..., None], rotary)
    values = decode(v)
    fixed = {"scale": 0.3, "held": held}
    expected = attend_held(turned_q, keys, values, length, starts, limits, **fixed)
    # Angles to the last bit of a float32 times elements of order 1.
    np.testing.assert_allclose(got.out, expected, atol=5 * MERGE)


def turned(x, positions, rotary):
    angle = positions[..., None] * np.asarray(rotary.inverse)
    cos, sin = rotary.factor * np.cos(angle), rotary.factor * np.sin(angle)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend_held(q, k, v, length, starts, limits, *, scale, held):
    """`reference.decode_attention` for lengths too large to replay."""
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[1]
    for b, t in np.ndindex(q.shape[:2]):
        seen = (held[b] >= max(starts[b, t], 0)) & (held[b] < min(limits[b, t], length[b]))
        for n in range(q.shape[2] if seen.any() else 0):
            scores = k[b, n // group, seen] @ q[b, t, n] * scale
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, n // group, seen] / weights.sum()
    return out


def test_only_tiles_inside_the_span_are_read(monkeypatch):
    monkeypatch.setattr(xla_path, "BLOCK", 8)
    k, v = packed("kivi3")
    length = np.array([30, 26], np.int32)
    limits, starts = length[:, None], length[:, None] - 6
    expected = run(queries(1, 2), k, v, length=length, starts=starts, limits=limits)
    spoil = lambda x: x.at[:, :, : x.shape[2] * 16 // SLOTS].set(jnp.nan)  # noqa: E731
    dirty = [replace(x, scale=spoil(x.scale)) for x in (k, v)]
    got = run(queries(1, 2), *dirty, length=length, starts=starts, limits=limits)
    np.testing.assert_array_equal(got.out, expected.out)


def test_a_short_sequence_is_not_read_as_far_as_a_long_one(monkeypatch):
    monkeypatch.setattr(xla_path, "_LEAST", 8)
    monkeypatch.setattr(xla_path, "BLOCK", 8)
    monkeypatch.setattr(xla_path, "_ALONE", 0)
    k, v = packed("kivi3", batch=3)
    length, q = np.array([5, 40, 17], np.int32), queries(1, 2, batch=3)
    expected = run(q, k, v, length=length, limits=length[:, None])
    spoil = lambda x: x.at[0, :, x.shape[2] * 8 // SLOTS :].set(jnp.nan)  # noqa: E731
    dirty = [replace(x, scale=spoil(x.scale)) for x in (k, v)]
    got = run(q, *dirty, length=length, limits=length[:, None])
    np.testing.assert_array_equal(got.out, expected.out)


def test_rows_that_see_nothing_are_empty():
    k, v = packed("int8")
    length, limits = np.array([0, 9], np.int32), np.array([[4], [0]], np.int32)
    got = run(queries(1, 2), k, v, length=length, limits=limits)
    assert not np.any(got.out) and np.all(got.lse == np.float32(MASK_VALUE))


def test_low_precision_queries_are_attended_in_float32():
    k, v = packed("int8")
    length = np.array([40, 11], np.int32)
    q = queries(1, 4).astype(jnp.bfloat16)
    got = run(q, k, v, length=length, limits=length[:, None])
    same = run(q.astype(jnp.float32), k, v, length=length, limits=length[:, None])
    assert got.out.dtype == jnp.float32
    np.testing.assert_allclose(got.out, same.out, atol=KERNEL_ATOL["float32"])


@pytest.mark.parametrize("name", ["int8", "kivi3", "table"])
@pytest.mark.parametrize("group", [4, 16])
def test_no_more_than_a_tile_is_decoded(name, group):
    """Temporaries do not grow with the cache, but for a few numbers per slot."""

    def temporaries(slots):
        k, v = (form.struct((1, KV_HEADS, slots, 128)) for form in FORMS[name][:2])
        q = jax.ShapeDtypeStruct((1, 1, KV_HEADS * group, 128), jnp.float32)
        fn = jax.jit(
            lambda q, k, v, n: quantized_decode_attention(q, k, v, length=n, limits=n[None])
        )
        n = jax.ShapeDtypeStruct((1,), jnp.int32)
        return fn.lower(q, k, v, n).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(4096), temporaries(16384)
    assert large - small <= 12288 * 32
    assert small < 4096 * KV_HEADS * 128 * 4 * 2  # the decoded keys and values


class TestDecodeStep:
    """A whole step of a model with donated caches of codes."""

    SLOTS = 8192

    @functools.cached_property
    def model(self):
        config = ModelConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            max_positions=self.SLOTS,
        )
        return DecoderLM(config, Execution(scan_layers=False))

    def compiled(self, policy):
        model = self.model
        caches = jax.eval_shape(
            lambda: model.init_caches(policy, batch=1, capacity=self.SLOTS, max_new=4)
        )

        def step(params, tokens, caches):
            positions = caches.length[:, None]
            out = model.forward(params, tokens, positions=positions, caches=caches)
            return jnp.argmax(out.logits, axis=-1), out.caches

        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        lowered = jax.jit(step, donate_argnums=2).lower(model.abstract_params(), token, caches)
        return lowered.compile(), sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))

    @pytest.mark.parametrize(
        "policy",
        [
            Quantized(),
            KIVI(bits=4),
            KIVI(bits=2, rope="pre", group_size=64),
            Quantized(residual_length=16),
        ],
        ids=["int4", "kivi", "kivi_pre", "int4_window"],
    )
    def test_caches_stay_where_they_are(self, policy):
        program, held = self.compiled(policy)
        sizes = program.memory_analysis()
        assert sizes.alias_size_in_bytes > held - 64  # lengths aside
        codes = self.SLOTS * 2 * 64 // 8 * policy.quantizers[0].bits
        floats = self.SLOTS * 2 * 64 * 4
        assert sizes.temp_size_in_bytes < floats
        for body in hlo.parse(program.as_text()).computations.values():
            for one in body.values():
                size = max(hlo.shape_bytes(one.shape), default=0)
                moved = one.opcode in ("copy", "transpose", "concatenate", "gather")
                assert not (moved and size >= codes), f"{one.opcode} of {one.shape}"
                assert not (one.shape.startswith("f32") and size >= floats), one.shape


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": queries(1, 2)[0]}, r"q.shape=.* must be \[B, T, N, H\]"),
        ({"q": queries(1, 2, width=16)}, r"k=.* must be a \[B=2, K, S, H=16\]"),
        ({"q": queries(1, 2, batch=3)}, r"k=.*B=3"),
        ({"q": jnp.ones((2, 1, 3, WIDTH))}, "multiple of K=2 query heads"),
        ({"v": packed("int8", slots=24)[1]}, "K=2 heads and S=40 slots"),
        ({"v": packed("int8", width=64)[1]}, "v=.*H=32"),
        ({"k": replace(packed("int8")[0], bits=4)}, "must end in 4 for width=32 and bits=4"),
        ({"rotary": Rotary(INVERSE)}, "query_positions must be given together"),
        (
            {"rotary": Rotary(INVERSE[:8]), "query_positions": np.ones((2, 1), np.int32)},
            "rotary.inverse=8 must be H/2=16 frequencies",
        ),
        ({"limits": np.ones(2, np.int32)}, r"limits.shape=\(2,\) must be \(2, 1\)"),
        ({"starts": np.ones((1, 1), np.int32)}, r"starts.shape=\(1, 1\) must be \(2, 1\)"),
        ({"limits": np.ones((2, 1))}, "limits='float64' must be an array of integers"),
        ({"length": np.ones(1, np.int32)}, r"length.shape=\(1,\) must be \(2,\)"),
        ({"softcap": 0.0}, "softcap=0.0 must be > 0"),
        ({"backend": "triton"}, "backend='triton' is unknown"),
        ({"backend": "mosaic_tpu"}, "needs a TPU, not a cpu"),
        ({"interpret": True}, "name backend="),
    ],
)
def test_bad_input_is_refused_before_any_work(change, match):
    k, v = packed("int8")
    rows = {"length": np.array([3, 4], np.int32), "limits": np.ones((2, 1), np.int32)}
    with pytest.raises(ValueError, match=match):
        quantized_decode_attention(**{"q": queries(1, 2), "k": k, "v": v} | rows | change)
