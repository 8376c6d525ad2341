# SPDX-License-Identifier: Apache-2.0
"""Loading and saving checkpoint folders; the safetensors library is the other side."""

import json
import math
import os
import time
import tracemalloc
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import hf
from sqzjax.io.hf_names import flatten, insert, sources
from sqzjax.io.safetensors import SafetensorsFile
from sqzjax.models import DecoderLM, stack_layers
from sqzjax.models.config import FAMILIES
from sqzjax.models.hf_map import TABLES
from sqzjax.models.shapes import param_shapes
from tests.conftest import golden_root
from tests.sqzjax.checkpoint_folders import (
    CONFIG,
    assert_same,
    edit_config,
    execution,
    random_params,
    save_small,
    tamper,
    tensors_of,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy")

GOLDEN = ["llama", "llama_mha_tied", "llama3_rope", "mistral_window", "qwen2", "qwen3"]
GOLDEN += ["llada", "dream", "sdar"]
LAYOUTS = [True, False]


@pytest.fixture(params=GOLDEN)
def golden(request):
    folder = golden_root() / request.param
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set SQZJAX_GOLDEN to the reference checkpoints")
    return folder


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint: its folder and its parameters."""
    return save_small(tmp_path / "saved")


@pytest.mark.parametrize("scan", LAYOUTS)
def test_golden_folder_survives_loading_and_saving(golden, scan, tmp_path):
    config, params = hf.load(golden, execution=execution(scan))
    abstract = flatten(DecoderLM(config, execution(scan)).abstract_params())
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == {
        path: leaf.shape for path, leaf in abstract.items()
    }
    hf.save(tmp_path / "out", config, params, max_shard_bytes=50_000)
    original, written = tensors_of(golden), tensors_of(tmp_path / "out")
    assert original.keys() == written.keys()
    for name, values in original.items():
        assert (values.dtype, values.shape) == (written[name].dtype, written[name].shape)
        assert values.tobytes() == written[name].tobytes(), name
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    again_config, again = hf.load(tmp_path / "out", execution=execution(scan), verify=True)
    assert again_config == config
    assert_same(params, again)


def test_stories_folder_loads(shared_data):
    config, params = hf.load(shared_data / "stories260K")
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == config.num_params
    assert "head" not in params


@pytest.mark.parametrize("scan", LAYOUTS)
def test_linear_weights_are_transposed_and_layers_in_order(saved, scan):
    folder, _ = saved
    stored = tensors_of(folder)
    _, params = hf.load(folder, execution=execution(scan))
    for layer in range(CONFIG.num_layers):
        for name in ("q", "k", "v", "o"):
            tree = params["layers" if scan else f"layers_{layer}"]["attn"][name]["kernel"]
            expected = stored[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T
            np.testing.assert_array_equal(tree[layer] if scan else tree, expected)
    np.testing.assert_array_equal(params["head"]["kernel"], stored["lm_head.weight"].T)
    embedding = params["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, stored["model.embed_tokens.weight"])


def test_both_layouts_hold_the_same_and_save_the_same(saved, tmp_path):
    folder, _ = saved
    _, stacked = hf.load(folder, execution=execution(True))
    _, unrolled = hf.load(folder, execution=execution(False))
    assert_same(stacked, stack_layers(unrolled))
    hf.save(tmp_path / "unrolled", CONFIG, unrolled)
    for name in ("model.safetensors", "config.json", "checksums.json"):
        assert (folder / name).read_bytes() == (tmp_path / "unrolled" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_has_a_name(family):
    config = replace(CONFIG, family=family, qk_norm=False)
    names = [row.source for row in TABLES[family]]
    assert len(set(names)) == len(names)
    for row in TABLES[family]:
        assert row.path.startswith("layers/") == ("{layer}" in row.source)
        assert row.transpose == row.path.endswith("kernel")
    for scan in LAYOUTS:
        shapes = param_shapes(config, scan)
        assert sources(config, shapes).keys() == shapes.keys()
    if family == "llada":
        config = replace(config, out_bias=True)
        with pytest.raises(ConfigError, match="layers/attn/o/bias"):
            sources(config, param_shapes(config, True))


# dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_dtype_is_kept_and_a_named_one_applied(tmp_path, dtype):
    params = random_params(CONFIG)
    hf.save(tmp_path / "x", CONFIG, params, dtype=dtype)
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    assert raw["torch_dtype"] == raw["dtype"] == dtype
    _, loaded = hf.load(tmp_path / "x")
    assert_same(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    _, wide = hf.load(tmp_path / "x", dtype="float32")
    assert_same(wide, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params))


def test_mixed_dtypes_survive(tmp_path):
    params = random_params(CONFIG, dtype=ml_dtypes.bfloat16)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].astype(np.float32)
    hf.save(tmp_path / "x", CONFIG, params)
    assert_same(hf.load(tmp_path / "x")[1], params)


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.float8_e4m3fn])
def test_dtype_without_native_arrays_must_be_converted_by_name(tmp_path, dtype):
    params = random_params(CONFIG)
    hf.save(tmp_path / "x", CONFIG, params, dtype=dtype)
    with pytest.raises(CheckpointError, match="choose a dtype"):
        hf.load(tmp_path / "x")
    _, loaded = hf.load(tmp_path / "x", dtype="bfloat16")
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(ml_dtypes.bfloat16), params)
    assert_same(loaded, expected)


def test_layers_of_different_dtypes_and_integers_are_refused(saved):
    folder, _ = saved
    name = "model.layers.1.mlp.up_proj.weight"
    tamper(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.float16)}))
    with pytest.raises(CheckpointError, match=r"layers/mlp/up/kernel.*float16, float32"):
        hf.load(folder)
    hf.load(folder, dtype="float32")
    tamper(folder, lambda tensors: tensors.update({name: tensors[name].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=r"int8.*not as floating point"):
        hf.load(folder, dtype="float32")


# Shardings


def mesh_shardings(config, scan):
    mesh = jax.make_mesh((2, 4), ("data", "model"))

    def spec(path, shape):
        if path.endswith("kernel"):
            return PartitionSpec(*[None] * (len(shape) - 2), "data", "model")
        return PartitionSpec("model") if path == "embed/embedding" else PartitionSpec()

    shardings = {}
    for path, shape in param_shapes(config, scan).items():
        insert(shardings, path, NamedSharding(mesh, spec(path, shape)))
    return shardings


@pytest.mark.parametrize("scan", LAYOUTS)
def test_each_device_reads_and_holds_only_its_part(saved, scan, monkeypatch):
    folder, _ = saved
    assert len(jax.devices()) == 8
    elements = 0
    original = SafetensorsFile.read

    def counting(self, name, index=()):
        nonlocal elements
        part = original(self, name, index)
        elements += part.size
        return part

    monkeypatch.setattr(SafetensorsFile, "read", counting)
    shardings = mesh_shardings(CONFIG, scan)
    _, params = hf.load(folder, execution=execution(scan), shardings=shardings)
    # Replicated and partly replicated slices are read once, not once per device.
    assert elements == CONFIG.num_params
    monkeypatch.undo()
    _, whole = hf.load(folder, execution=execution(scan))
    assert_same(params, whole)
    for path, leaf in flatten(params).items():
        sharding = flatten(shardings)[path]
        assert leaf.sharding == sharding
        assert len(leaf.addressable_shards) == 8
        for shard in leaf.addressable_shards:
            assert shard.data.shape == sharding.shard_shape(leaf.shape)
    kernel = flatten(params)["layers/mlp/up/kernel" if scan else "layers_0/mlp/up/kernel"]
    assert math.prod(kernel.addressable_shards[0].data.shape) * 8 == kernel.size


def test_layers_can_be_spread_over_devices(saved):
    folder, params = saved
    shardings = mesh_shardings(CONFIG, True)
    mesh = jax.make_mesh((3,), ("stage",), devices=jax.devices()[:3])
    for path in param_shapes(CONFIG, True):
        spec = PartitionSpec("stage") if path.startswith("layers/") else PartitionSpec()
        insert(shardings, path, NamedSharding(mesh, spec))
    _, loaded = hf.load(folder, shardings=shardings)
    assert_same(loaded, params)
    assert loaded["layers"]["mlp"]["up"]["kernel"].addressable_shards[1].data.shape == (1, 32, 48)


def test_sharded_parameters_are_saved(saved, tmp_path):
    folder, _ = saved
    _, params = hf.load(folder, shardings=mesh_shardings(CONFIG, True))
    hf.save(tmp_path / "again", CONFIG, params)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (folder / "model.safetensors").read_bytes()


def test_shardings_of_another_shape_are_refused(saved):
    folder, _ = saved
    shardings = mesh_shardings(CONFIG, True)
    shardings["other"] = shardings.pop("head")
    with pytest.raises(ValueError, match="missing: head/kernel; unexpected: other/kernel"):
        hf.load(folder, shardings=shardings)


# Tensors that do not fit


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(saved):
    folder, _ = saved

    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["score.weight"] = np.zeros((1,), np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()

    tamper(folder, change)
    with pytest.raises(CheckpointError) as caught:
        hf.load(folder)
    text = str(caught.value)
    assert "2 tensors missing: model.layers.0.mlp.up_proj.weight, model.norm.weight" in text
    assert "2 tensors unexpected: model.layers.3.mlp.up_proj.weight, score.weight" in text
    assert "lm_head.weight is [32, 64], expected [64, 32]" in text


def test_long_lists_are_cut_after_twenty(saved):
    folder, _ = saved
    tamper(folder, lambda t: t.update({f"extra.{i}": np.zeros(1, np.float32) for i in range(50)}))
    with pytest.raises(CheckpointError, match=r"50 tensors unexpected.*and 30 more") as caught:
        hf.load(folder)
    assert str(caught.value).count("extra.") == 20


def test_transposed_square_weight_cannot_be_told_but_transposed_table_can(saved):
    folder, _ = saved
    name = "model.embed_tokens.weight"
    tamper(folder, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    with pytest.raises(CheckpointError, match=r"is \[32, 64\], expected \[64, 32\]"):
        hf.load(folder)


def test_recomputed_buffers_are_ignored(saved):
    folder, params = saved
    buffers = ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    tamper(folder, lambda t: t.update({name: np.zeros(8, np.float32) for name in buffers}))
    assert_same(hf.load(folder)[1], params)
    tamper(folder, lambda t: t.update({"model.rotary_emb.inv_freq.x": np.zeros(8, np.float32)}))
    with pytest.raises(CheckpointError, match="1 tensors unexpected"):
        hf.load(folder)


def test_tied_head_may_be_absent_or_an_exact_copy(saved):
    folder, params = saved
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        hf.load(folder)
    tamper(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    config, tied = hf.load(folder)
    assert config.tie_embeddings and "head" not in tied
    tamper(folder, lambda t: t.pop("lm_head.weight"))
    assert_same(hf.load(folder)[1], tied)
    assert_same(tied, {name: tree for name, tree in params.items() if name != "head"})
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 tensors missing: lm_head\.weight"):
        hf.load(folder)


def test_signed_zeros_and_nans_count_when_the_tied_head_is_compared(saved):
    folder, _ = saved
    edit_config(folder, tie_word_embeddings=True)

    def change(tensors):
        tensors["model.embed_tokens.weight"][:2] = [[np.nan], [0.0]]
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    tamper(folder, change)
    hf.load(folder)
    tamper(
        folder,
        lambda tensors: np.negative(
            tensors["lm_head.weight"][1:2], out=tensors["lm_head.weight"][1:2]
        ),
    )
    with pytest.raises(CheckpointError, match="differs"):
        hf.load(folder)


def test_wrong_sizes_fail_before_anything_is_allocated(saved):
    folder, _ = saved
    sizes = {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 1000}
    edit_config(folder, **sizes, layer_types=None)
    begin = time.process_time()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="with a wrong shape"):
        hf.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000
    assert time.process_time() - begin < 5


def test_host_holds_one_parameter_beside_the_result(tmp_path):
    config = replace(CONFIG, hidden_size=256, intermediate_size=1024, num_layers=8)
    hf.save(tmp_path / "x", config, random_params(config))
    largest = 4 * max(math.prod(shape) for shape in param_shapes(config, True).values())
    shardings = mesh_shardings(config, True)
    for target in (None, shardings):
        tracemalloc.start()
        hf.load(tmp_path / "x", shardings=target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # numpy memory that the CPU backend adopts counts as the result.
        assert peak < 4 * config.num_params + largest + 5_000_000


def test_loaded_parameters_do_not_depend_on_the_file(saved):
    folder, params = saved
    _, loaded = hf.load(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)
    assert_same(loaded, params)
