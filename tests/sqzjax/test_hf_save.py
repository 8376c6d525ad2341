# SPDX-License-Identifier: Apache-2.0
"""Saving checkpoint folders, and paths that are none; the safetensors library is the other side."""

import json
import os
import shutil
from dataclasses import replace

import ml_dtypes
import pytest

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import hf
from sqzjax.io.safetensors import SafetensorsFile
from sqzjax.io.shards import TensorFolder
from sqzjax.models.config import RopeConfig
from tests.sqzjax.checkpoint_folders import (
    CONFIG,
    save_small,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def saved(tmp_path):
    """A small checkpoint: its folder and its parameters."""
    return save_small(tmp_path / "saved")


def test_path_that_is_no_folder_says_so(tmp_path):
    for load in (hf.load, hf.read_config):
        with pytest.raises(CheckpointError, match="nothing is downloaded"):
            load("organization/model")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hf.load(tmp_path)


def test_folder_of_pickles_is_refused_with_the_conversion(saved):
    folder, _ = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        hf.load(folder)


def test_written_folder_has_everything_a_reader_expects(saved, tmp_path):
    _, params = saved
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    out = tmp_path / "deep" / "out"
    config = replace(CONFIG, tokens=replace(CONFIG.tokens, bos=1, eos=(2, 3), pad=0))
    hf.save(out, config, params, max_shard_bytes=20_000, tokenizer_files=[tokenizer])
    shards = sorted(path.name for path in out.glob("model-*"))
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert {path.name for path in out.iterdir()} == {
        *shards,
        "model.safetensors.index.json",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * config.num_params
    for name, shard in index["weight_map"].items():
        assert name in safetensors_numpy.load_file(out / shard)
    sizes = [sum(a.nbytes for a in safetensors_numpy.load_file(out / s).values()) for s in shards]
    assert max(sizes) <= 20_000
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert SafetensorsFile(out / shards[0]).metadata == {"format": "pt"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777
    names = list(index["weight_map"])
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"
    assert [shards.index(shard) for shard in index["weight_map"].values()] == sorted(
        shards.index(shard) for shard in index["weight_map"].values()
    )


def test_existing_folder_is_not_overwritten_unless_asked(saved, tmp_path):
    folder, params = saved
    with pytest.raises(CheckpointError, match="overwrite=True"):
        hf.save(folder, CONFIG, params)
    (folder / "stale.safetensors").write_bytes(b"")
    hf.save(folder, CONFIG, params, dtype="bfloat16", overwrite=True)
    assert not (folder / "stale.safetensors").exists()
    assert TensorFolder(folder).tensors["lm_head.weight"].dtype == ml_dtypes.bfloat16
    other = tmp_path / "photos"
    other.mkdir()
    hf.save(other, CONFIG, params)  # an empty folder is fine
    shutil.rmtree(other)
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        hf.save(other, CONFIG, params, overwrite=True)
    assert os.listdir(other) == ["holiday.jpg"]
    assert sorted(os.listdir(tmp_path)) == ["photos", "saved"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_save_leaves_what_was_there(saved, tmp_path, monkeypatch, overwrite):
    folder, params = saved
    target = folder if overwrite else tmp_path / "new"
    before = sorted(os.listdir(tmp_path))
    content = (folder / "model.safetensors").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        hf.save(target, CONFIG, params, dtype="bfloat16", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before
    assert (folder / "model.safetensors").read_bytes() == content


def test_wrong_arguments_of_save_are_named(saved, tmp_path):
    _, params = saved
    target = tmp_path / "new"
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        hf.save(target, CONFIG, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match="missing head/kernel"):
        hf.save(target, CONFIG, {n: tree for n, tree in params.items() if n != "head"})
    with pytest.raises(ValueError, match=r"embed/embedding is \[64, 32\], expected \[65, 32\]"):
        hf.save(target, replace(CONFIG, vocab_size=65, embedding_size=65), params)
    rope = RopeConfig(kind="linear", factor=2.0, attention_factor=2.0)
    with pytest.raises(ConfigError, match="rope="):
        hf.save(target, replace(CONFIG, rope=rope), params)
    with pytest.raises(CheckpointError, match=r"tokenizer file .* does not exist"):
        hf.save(target, CONFIG, params, tokenizer_files=[tmp_path / "none.json"])
    with pytest.raises(ValueError, match=r"model\.safetensors is written"):
        hf.save(target, CONFIG, params, tokenizer_files=[tmp_path / "saved/model.safetensors"])
    assert not target.exists()


def test_folders_that_cannot_be_made_are_checkpoint_errors(saved, tmp_path):
    folder, params = saved
    for target in ("/proc/x/y", "/dev/null/model", folder / "config.json" / "below"):
        with pytest.raises(CheckpointError, match=rf"{target} cannot be written: .* choose"):
            hf.save(target, CONFIG, params)
