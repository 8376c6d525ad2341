# SPDX-License-Identifier: Apache-2.0
"""The library kernels of `attention`: splash interpreted, cuDNN lowered, and what they refuse."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.attention import AttentionMask, attention
from pallas_kernels.attention.api import Problem
from pallas_kernels.attention.splash import Config, attention_splash
from pallas_kernels.common import Target
from tests.pallas_kernels.attention_reference import (
    arrays,
    compare,
    expected,
    seen_pairs,
    value_and_gradients,
)
from tests.tolerances import KERNEL_ATOL

CPU = Target("cpu", "cpu")
LENGTH = 256


def interpreted(q, k, v, segments, mask, softcap=None):
    problem = Problem(mask, True, 0.25, softcap)
    tiles = Config(128, 128)
    fixed: dict[str, Any] = {"target": CPU, "interpret": True, "config": tiles}
    return attention_splash(q, k, v, segments, problem, **fixed)


def documents():
    """One row of two documents and padding, one of a single document."""
    ids = np.zeros((2, LENGTH), np.int32)
    ids[0, 100:] = 1
    ids[0, 230:] = -1
    return jnp.asarray(ids)


@pytest.mark.parametrize(
    ("mask", "packed", "softcap"),
    [
        (AttentionMask(), True, 2.0),
        (AttentionMask("bidirectional"), True, None),
        (AttentionMask("block_causal", 32), True, None),
        (AttentionMask("same_block", 48), True, None),
        (AttentionMask("earlier_blocks", 128), False, None),  # a tile without keys
        (AttentionMask(window=50), False, None),
        (AttentionMask("bidirectional", window=50), False, None),
        (AttentionMask("block_causal", 32, window=40), False, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("use_lse", [False, True], ids=["out", "out_lse"])
def test_splash_equals_the_definition_in_value_and_gradient(mask, packed, softcap, use_lse):
    """With the log-sum-exp in the loss the backward pass is another one: XLA's."""
    q, k, v = arrays(0, 2, LENGTH, LENGTH, 1, 2, 16)
    segments = documents() if packed else None
    pair = None if segments is None else (segments, segments)

    def run(q, k, v):
        out, lse = interpreted(q, k, v, pair, mask, softcap)
        return out, lse if use_lse else jax.lax.stop_gradient(lse)

    seen = seen_pairs(mask, (1, LENGTH, LENGTH), None, None, None, None)
    if packed:
        ids = np.asarray(segments)
        seen = seen & (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
    else:
        seen = np.repeat(seen, 2, axis=0)
    wanted = expected(q, k, v, seen, 0.25, softcap, use_lse=use_lse)
    compare([np.asarray(x) for x in value_and_gradients(run, q, k, v)], wanted)


def test_splash_in_bfloat16_and_under_vmap():
    q, k, v = (jnp.stack([x, -x]) for x in arrays(1, 1, 128, 128, 2, 2, 64, "bfloat16"))
    run = partial(interpreted, segments=None, mask=AttentionMask())
    got, _ = jax.vmap(run)(q, k, v)
    for layer in range(2):
        exact = attention(q[layer], k[layer], v[layer], scale=0.25, backend="xla").out
        # The result is rounded to 8 bits.
        np.testing.assert_allclose(got[layer], exact, atol=2 * KERNEL_ATOL["bfloat16"])


class Hopper(AbstractDevice):
    compute_capability = "9.0"


GPU = Hopper(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


def describe(device):
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def lowered(fn, device, *args):
    """Return how often the program calls each kernel of a library."""
    platform = "cuda" if device is GPU else "tpu"
    with describe(device):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return Counter(re.findall(r"custom_call @([\w$]+)", text))


def structs(dtype="bfloat16", length=512):
    q = jax.ShapeDtypeStruct((2, length, 8, 64), dtype)
    k = jax.ShapeDtypeStruct((2, 2, length, 64), dtype)
    return q, k, k


def grad_of(fn, *, use_lse):
    def loss(q, k, v):
        out, lse = fn(q, k, v)
        return jnp.sum(out) + (jnp.sum(lse) if use_lse else 0.0)

    return jax.grad(loss, (0, 1, 2))


@pytest.fixture
def cudnn(monkeypatch):
    """A version of cuDNN to lower for; without the library jax refuses before lowering."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask("bidirectional"), AttentionMask(window=100)], ids=str
)
def test_a_gpu_gets_cudnn(mask, cudnn):
    fn = partial(attention, mask=mask)
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    assert lowered(fn, GPU, *structs()) == {forward: 1}
    assert lowered(grad_of(fn, use_lse=False), GPU, *structs()) == {forward: 1, backward: 1}
    # cuDNN would drop the cotangent of the log-sum-exp: its backward pass must not be used.
    assert lowered(grad_of(fn, use_lse=True), GPU, *structs()) == {forward: 1}


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask("bidirectional"),
        AttentionMask("block_causal", 32),
        AttentionMask("earlier_blocks", 32),
        AttentionMask("same_block", 32, window=9),
    ],
    ids=str,
)
def test_a_tpu_gets_splash(mask):
    fn = partial(attention, mask=mask)
    kernel = "tpu_custom_call"
    assert lowered(fn, TPU, *structs()) == {kernel: 1}
    assert lowered(grad_of(fn, use_lse=False), TPU, *structs()) == {kernel: 3}
    # The kernel that has a derivative and the one that returns the log-sum-exp.
    assert lowered(grad_of(fn, use_lse=True), TPU, *structs()) == {kernel: 2}


def test_without_cudnn_a_gpu_gets_xla():
    assert not lowered(partial(attention, mask=AttentionMask("same_block", 4)), GPU, *structs())
    assert not lowered(attention, GPU, *structs("float32"))


@pytest.mark.parametrize(
    ("device", "change", "match"),
    [
        (GPU, {"mask": AttentionMask("block_causal", 4)}, "no kind='block_causal'"),
        (GPU, {"mask": AttentionMask("bidirectional", window=4)}, "needs kind='causal'"),
        (GPU, {"softcap": 2.0}, "no softcap"),
        (GPU, {"segments": True}, "segments are not ids"),
        (GPU, {"dtype": "float32"}, "16 bits, not float32"),
        (GPU, {"positions": True}, "leave the positions"),
        (GPU, {"mask": AttentionMask(window=jnp.int32(3))}, "window must be static"),
        (TPU, {"positions": True}, "leave the positions"),
        (TPU, {"length": 300}, "T=300, S=300"),
        (TPU, {"mask": AttentionMask(window=jnp.int32(3))}, "window must be static"),
        (TPU, {"mask": AttentionMask("earlier_blocks", 4), "segments": True}, "with segments"),
    ],
)
def test_what_a_library_cannot_do_is_said(device, change, match):
    options: dict[str, Any] = dict(change)
    q, k, v = structs(options.pop("dtype", "bfloat16"), length := options.pop("length", 512))
    tokens = jnp.zeros((2, length), jnp.int32)
    if options.pop("segments", False):
        options |= {"query_segments": tokens, "key_segments": tokens}
    if options.pop("positions", False):
        options |= {"query_positions": tokens, "key_positions": tokens}
    backend = "cudnn" if device is GPU else "splash"
    with describe(device), pytest.raises(ValueError, match=match):
        jax.eval_shape(partial(attention, backend=backend, **options), q, k, v)
