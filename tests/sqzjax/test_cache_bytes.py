# SPDX-License-Identifier: Apache-2.0
"""Bytes of caches without allocating them: real arrays, closed forms, published tables, shards."""

import dataclasses

import jax
import numpy as np
import pytest

from eval import cache_plan
from eval.cache_plan_config import CachePlanConfig
from eval.cache_rows import CacheEntry
from eval.speed_config import SpeedModel
from sqzjax import kvcache
from sqzjax.analysis.cache_bytes import cache_bytes
from sqzjax.kvcache import KIVI, Dense, KVQuant, Quantized, Quest
from sqzjax.models import DecoderLM, Execution, ModelConfig
from sqzjax.models.sizes import SIZES
from sqzjax.quant import Uniform
from sqzjax.sharding_config import MeshConfig
from tests import tolerances

GIB = 2**30
TINY = ModelConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_positions=512,
    sliding_window=64,
    window_layers=(True, False, True),
)
POLICIES = [
    Dense(),
    Quest(page_size=16),
    Quantized(residual_length=32),
    KIVI(bits=3, group_size=16, residual_length=16),
]
PRESETS = ["llama1_7b", "llama1_65b", "llama3.1_8b", "llama3.1_70b", "mistral_7b_v0.3", "qwen3_8b"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_allocated_arrays(policy, dtype):
    """Layers with and without a window, three sequences, arrays that are really there."""
    execution = Execution(dtype=dtype, param_dtype=dtype, scan_layers=False)
    model = TINY
    if policy.kind == "quest":  # refuses windows
        model = dataclasses.replace(TINY, sliding_window=None, window_layers=())
    caches = DecoderLM(model, execution).init_caches(policy, batch=3, capacity=200, max_new=8)
    size = cache_bytes(model, policy, context=200, batch=3, max_new=8, dtype=dtype)
    assert size.total == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert size.device_total == size.total and size.devices == 1
    assert size.per_token == size.total / 600
    assert size.average_bits == 8 * size.total / (2 * 3 * 200 * TINY.num_layers * 2 * 16)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("context", [131_072, 1_048_576, 10_000_000])
def test_integer_codes_follow_their_closed_form(name, context):
    """Per token and head: codes of `bits`, 16 bits each of scale and offset; no more grows."""
    model = SIZES[name]
    for bits in (2, 4, 8):
        codec = Uniform(bits=bits)
        size = cache_bytes(model, Quantized(key=codec, value=codec), context=context)
        slots = -(-context // 512) * 512
        per_head = bits * model.head_dim + 32
        expected = 2 * model.num_layers * model.num_kv_heads * slots * per_head // 8
        counters = size.total - expected
        assert 0 <= counters <= 64 * model.num_layers
        assert size.average_bits == pytest.approx(
            bits + 32 / model.head_dim, rel=tolerances.PUBLISHED_BYTES
        )


# Published sizes (GiB) of LLaMA-7B's cache, estimates (arXiv 2401.18079, tables 1 and 8).
PUBLISHED = {131_072: {4: 16.0, 3: 12.0, 2: 8.0}, 1_048_576: {2: 64.0}, 10_000_000: {2: 611.5}}
PUBLISHED_OUTLIERS = {4: 17.3, 3: 13.3, 2: 9.3}


def test_sixteen_bits_take_what_the_published_table_says():
    size = cache_bytes(SIZES["llama1_7b"], Dense(), context=131_072)
    assert size.total / GIB == pytest.approx(64.0, rel=tolerances.PUBLISHED_BYTES)
    assert size.compression == pytest.approx(1, rel=tolerances.PUBLISHED_BYTES)


@pytest.mark.parametrize(
    ("context", "bits"), [(context, bits) for context, row in PUBLISHED.items() for bits in row]
)
def test_codebooks_take_the_published_bytes_and_a_scale_per_head(context, bits):
    """The paper's value scales (32 bits) serve a token of all heads, ours a token of one head:
    16/128 instead of 16/4096 bits per number over keys and values. That is the whole difference.
    """
    model = SIZES["llama1_7b"]
    size = cache_bytes(model, KVQuant(bits=bits, outliers=0.0), context=context)
    more = 16 / model.head_dim - 16 / (model.num_kv_heads * model.head_dim)
    without = (size.total - more * size.elements / 8) / GIB
    assert without == pytest.approx(PUBLISHED[context][bits], rel=tolerances.THREE_DIGITS)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_percent_of_outliers_takes_the_published_bytes(bits):
    """Ours hold a 16-bit value and 8 bits of place in one slot of 128, the paper's 32 bits each of
    1 % and a pointer a token; with the scales above, both come to the same."""
    size = cache_bytes(SIZES["llama1_7b"], KVQuant(bits=bits, outliers=0.01), context=131_072)
    expected = PUBLISHED_OUTLIERS[bits]
    assert size.total / GIB == pytest.approx(expected, abs=tolerances.PUBLISHED_OUTLIERS)
    assert size.average_bits == pytest.approx(
        bits + 16 / 128 + 24 / 128, rel=tolerances.PUBLISHED_BYTES
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_group_wise_codes_cost_what_their_formula_says(bits):
    """KIVI: bits + 32 / group, and a window that no longer matters at 128K tokens."""
    size = cache_bytes(SIZES["llama1_7b"], KIVI(bits=bits), context=131_072)
    assert size.average_bits == pytest.approx(bits + 1, rel=tolerances.WINDOW_SHARE)


@pytest.mark.parametrize("policy", [Dense(), KIVI(), Quest()], ids=lambda policy: policy.kind)
def test_heads_and_sequences_are_shared_out(policy):
    """A device of 2 x 4 holds an eighth, but for counters of each sequence that heads share."""
    model = SIZES["llama3.1_8b"]
    mesh = MeshConfig(data=2, tensor=4)
    size = cache_bytes(model, policy, context=131_072, batch=2, mesh=mesh)
    assert size.devices == 8
    spare = size.device_total - size.total / 8
    assert 0 <= spare <= 64 * model.num_layers
    whole = cache_bytes(model, policy, context=131_072, batch=2)
    assert whole.total == size.total == whole.device_total


def test_heads_that_do_not_divide_stay_whole():
    model = SIZES["qwen2.5_7b"]  # 4 kv heads
    eight = cache_bytes(model, Dense(), context=4096, mesh=MeshConfig(data=1, tensor=8))
    four = cache_bytes(model, Dense(), context=4096, mesh=MeshConfig(data=1, tensor=4))
    assert eight.device_total == eight.total > 3 * four.device_total


def test_shards_are_those_of_devices():
    """The same rule places real arrays: the device that is here holds what one of one should."""
    mesh = MeshConfig(data=1)
    size = cache_bytes(TINY, KIVI(group_size=16), context=128, mesh=mesh, dtype="float32")
    model = DecoderLM(TINY, Execution(scan_layers=False))
    caches = model.init_caches(KIVI(group_size=16), batch=1, capacity=128, max_new=1)
    assert size.device_total == kvcache.nbytes(caches)


def test_open_axes_are_refused():
    with pytest.raises(ValueError, match="every axis a size"):
        cache_bytes(TINY, Dense(), context=64, mesh=MeshConfig(data=-1))


def test_a_plan_lists_every_model_cache_and_length(tmp_path):
    config = CachePlanConfig(
        models=(SpeedModel(name="llama1_7b"), SpeedModel(name="qwen3_8b")),
        caches=(
            CacheEntry(cache={"kind": "dense"}),
            CacheEntry(cache={"kind": "kivi", "bits": 2, "group_size": 24}, name="odd"),
        ),
        contexts=(131_072, 10_000_000),
    )
    record = cache_plan.run_cache_plan(config, tmp_path)
    text = (tmp_path / "cache_bytes.md").read_text()
    assert [row["model"] for row in record["rows"]] == ["llama1_7b"] * 2 + ["qwen3_8b"] * 2
    dense, odd = record["rows"][:2]
    assert [size["context"] for size in dense["sizes"]] == [131_072, 10_000_000]
    assert np.allclose([s["total"] / s["device_total"] for s in dense["sizes"]], 8)
    assert "group_size=24" in odd["error"] and not odd["sizes"]
    assert "| dense | 16.00 | 64.0 | 8.00 | 4,882.8 | 610.35 |" in text and "group_size=24" in text
    with pytest.raises(ValueError, match="numbers >= 1"):
        dataclasses.replace(config, contexts=())
