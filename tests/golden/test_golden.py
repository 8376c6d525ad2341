# SPDX-License-Identifier: Apache-2.0
"""Every reference checkpoint of `SQZJAX_GOLDEN`: logits, hidden states, padding, caches, tokens.

The expected arrays come from the original PyTorch code in float32. A folder is tested for whatever
its `expected.npz` holds, so further configurations of the same families need no new test.
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import kvcache
from sqzjax.decode import SamplingConfig, generate
from sqzjax.io import hf
from sqzjax.models import DecoderLM, Execution
from tests import arrays
from tests.conftest import golden_root
from tests.tolerances import GOLDEN_HIDDEN, GOLDEN_LOGITS


def _folders() -> list[Path]:
    root = golden_root()
    found = sorted(root.glob("*/config.json")) if root.is_dir() else []
    # Folders of other architectures (the weather emulator) have no Hugging Face model type.
    return [path.parent for path in found if "model_type" in json.loads(path.read_text())]


FOLDERS = _folders()
if not FOLDERS:
    pytest.skip(
        f"no reference checkpoints in {golden_root()}: set SQZJAX_GOLDEN", allow_module_level=True
    )
LAYOUTS = [False, True]


@cache
def _load(folder: Path, scan: bool):
    execution = Execution(scan_layers=scan)
    config, params = hf.load(folder, execution=execution)
    return DecoderLM(config, execution), params, arrays.load(folder / "expected.npz")


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


def _need(expected, *names):
    missing = [name for name in names if name not in expected]
    if missing:
        pytest.skip(f"expected.npz has no {missing}")


@pytest.mark.parametrize("scan", LAYOUTS, ids=["unrolled", "stacked"])
def test_logits_and_hidden_states(folder, scan):
    """Also with padding on the left, where the reference has that."""
    model, params, expected = _load(folder, scan)
    ids = expected["input_ids"]

    @jax.jit
    def forward(params, positions):
        out = model.forward(params, jnp.asarray(ids), positions=positions, return_hidden="all")
        return out.logits, out.hidden

    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    logits, hidden = map(np.asarray, forward(params, positions))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=GOLDEN_LOGITS)
    for name, index in (("hidden_first", 0), ("hidden_mid", 2)):
        if name in expected:
            np.testing.assert_allclose(hidden[index], expected[name], rtol=0, atol=GOLDEN_HIDDEN)
    if "logits_left_padded" not in expected:
        return
    mask = expected["attention_mask"].astype(bool)
    assert not mask.all()
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
    logits, wanted = np.asarray(forward(params, positions)[0]), expected["logits_left_padded"]
    np.testing.assert_allclose(logits[mask], wanted[mask], rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize("scan", LAYOUTS, ids=["unrolled", "stacked"])
def test_cached_logits(folder, scan):
    """Chunked prefill, then single tokens, through the dense cache.

    Bidirectional models see later tokens only once these are cached, so their last chunk (all
    positions rewritten) is compared instead.
    """
    model, params, expected = _load(folder, scan)
    ids = expected["input_ids"]
    batch, length = ids.shape
    chunk = model.config.block_size or 7
    caches = model.init_caches(kvcache.Dense(), batch=batch, capacity=length, max_new=length)
    step = jax.jit(
        lambda p, ids, caches, positions: model.forward(p, ids, caches=caches, positions=positions)
    )
    pieces, start = [], 0
    whole = model.config.mask == "bidirectional"
    while start < length:
        size = length if whole else min(chunk if start < length // 2 or chunk != 7 else 1, length)
        size = min(size, length - start)
        positions = np.broadcast_to(np.arange(start, start + size, dtype=np.int32), (batch, size))
        logits, _, caches = step(params, ids[:, start : start + size], caches, positions)
        pieces.append(logits)
        start += size
    np.testing.assert_allclose(
        np.concatenate(pieces, axis=1), expected["logits"], rtol=0, atol=GOLDEN_LOGITS
    )
    np.testing.assert_array_equal(caches.length, [length] * batch)


def test_greedy_tokens(folder):
    model, params, expected = _load(folder, False)
    _need(expected, "greedy_prompt", "greedy_tokens")
    wanted = expected["greedy_tokens"]
    prompts = [row.tolist() for row in expected["greedy_prompt"]]
    tokens = wanted
    if tokens.shape[1] > len(prompts[0]) and np.array_equal(
        tokens[:, : len(prompts[0])], expected["greedy_prompt"]
    ):
        tokens = tokens[:, len(prompts[0]) :]
    sampling = SamplingConfig(max_new_tokens=tokens.shape[1], temperature=0.0)
    out = generate(model, params, prompts, sampling)
    np.testing.assert_array_equal(np.asarray(out.tokens)[:, : tokens.shape[1]], tokens)


def test_export_is_byte_identical(folder, tmp_path):
    """Tensors written by `hf.save` equal the originals, name by name, bit by bit."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model, params, _ = _load(folder, True)
    hf.save(tmp_path / "out", model.config, params)
    original = safetensors.load_file(folder / "model.safetensors")
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name].view(np.uint8), tensor.view(np.uint8), name)
    config, again = hf.load(tmp_path / "out", execution=model.execution)
    assert config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, again)
