# SPDX-License-Identifier: Apache-2.0
"""Folders of shards from strangers: hostile indexes, links out of the folder, damaged payloads."""

import json

import numpy as np
import pytest

from sqzjax.errors import CheckpointError
from sqzjax.io.safetensors import write
from sqzjax.io.shards import TensorFolder, write_folder
from tests.faults.test_safetensors import quick_and_small, spec


@pytest.fixture
def folder(tmp_path):
    """Three shards with one float32 tensor each."""
    path = tmp_path / "checkpoint"
    path.mkdir()
    tensors = [spec(name, np.full((4,), i, np.float32)) for i, name in enumerate("abc")]
    write_folder(path, tensors, max_shard_bytes=16)
    assert len(list(path.glob("model-0000?-of-00003.safetensors"))) == 3
    return path


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def shard(number):
    return f"model-0000{number}-of-00003.safetensors"


def test_sharded_folder_is_read(folder):
    tensors = TensorFolder(folder, verify=True)
    assert {name: tensors.read(name)[0] for name in tensors.tensors} == {"a": 0, "b": 1, "c": 2}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48
    assert index["weight_map"] == {"a": shard(1), "b": shard(2), "c": shard(3)}


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "sub/x.safetensors", "..", "", 3, None]
    + ["C:\\x.safetensors", "x\0.safetensors", "weights.bin", "x\n.safetensors"],
    ids=repr,
)
def test_shard_outside_the_folder_is_refused(folder, name):
    (folder.parent / "outside.safetensors").write_bytes((folder / shard(1)).read_bytes())
    edit_index(folder, lambda index: index["weight_map"].update(a=name))
    with pytest.raises(CheckpointError, match=r"not plain \.safetensors file names"):
        TensorFolder(folder)


def test_symlink_out_of_the_folder_is_refused(folder):
    (folder / shard(2)).rename(folder.parent / "elsewhere.safetensors")
    (folder / shard(2)).symlink_to(folder.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="outside the folder"):
        TensorFolder(folder)


def test_symlink_within_the_folder_and_into_a_download_cache_is_followed(folder):
    (folder / shard(2)).rename(folder / "renamed.safetensors")
    (folder / shard(2)).symlink_to("renamed.safetensors")
    assert "b" in TensorFolder(folder).tensors
    cache = folder.parent / "models--x"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = folder.rename(cache / "snapshots" / "revision")
    (snapshot / shard(1)).rename(cache / "blobs" / "hash")
    (snapshot / shard(1)).symlink_to("../../blobs/hash")
    assert TensorFolder(snapshot).read("a")[0] == 0
    (cache / "blobs" / "hash").rename(cache / "hash")
    (snapshot / shard(1)).unlink()
    (snapshot / shard(1)).symlink_to("../../hash")
    with pytest.raises(CheckpointError, match="outside the folder"):
        TensorFolder(snapshot)


def test_symlink_loop_is_refused(folder):
    (folder / shard(2)).unlink()
    (folder / shard(2)).symlink_to(shard(2))
    with pytest.raises(CheckpointError):
        TensorFolder(folder)


def test_missing_shard_is_named(folder):
    (folder / shard(3)).unlink()
    with pytest.raises(CheckpointError, match=shard(3)):
        TensorFolder(folder)


def test_tensor_in_two_shards_is_named(folder):
    both = [spec("a", np.zeros(1, np.float32)), spec("b", np.zeros(1, np.float32))]
    write(folder / shard(2), both)
    with pytest.raises(CheckpointError, match=f"'a' is in {shard(1)} and in {shard(2)}"):
        TensorFolder(folder)


def test_index_that_disagrees_with_the_shards_lists_every_tensor(folder):
    def change(index):
        index["weight_map"] = {"a": shard(2), "b": shard(2), "ghost": shard(1), "d": shard(3)}

    edit_index(folder, change)
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(folder)
    for text in (f"'a' is not in {shard(2)}", "'ghost' is not in", "'c' in", "'d' is not in"):
        assert text in str(caught.value)


INDEXES = {
    "not json": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "empty map": b'{"weight_map": {}}',
    "map is a list": b'{"weight_map": ["a"]}',
    "duplicate tensor": b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
    "1 MB of nesting": b'{"weight_map": ' + b"[" * (1 << 20),
    "1 MB of objects": b'{"weight_map":' + b'{"a":' * (1 << 18),
    "1 MB of repeated keys": b'{"weight_map": {' + b'"a":0,' * (1 << 18) + b'"a":0}}',
    "invalid utf-8": b'{"weight_map": {"\xff": "x.safetensors"}}',
    "huge number": b'{"weight_map": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("data", INDEXES.values(), ids=INDEXES)
def test_hostile_index_is_rejected(folder, data):
    (folder / "model.safetensors.index.json").write_bytes(data)
    with quick_and_small(), pytest.raises(CheckpointError, match=r"index\.json"):
        TensorFolder(folder)


def test_oversized_index_is_refused_unread(folder):
    with open(folder / "model.safetensors.index.json", "r+b") as file:
        file.truncate(1 << 40)
    with quick_and_small(), pytest.raises(CheckpointError, match="at most"):
        TensorFolder(folder)


def test_verify_finds_every_flipped_byte_of_the_payload(folder):
    path = folder / shard(2)
    good = path.read_bytes()
    for position in range(len(good) - 16, len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        TensorFolder(folder)  # the format itself has no checksum
        with pytest.raises(CheckpointError, match=shard(2)):
            TensorFolder(folder, verify=True)
    path.write_bytes(good)
    TensorFolder(folder, verify=True)


@pytest.mark.parametrize("content", [None, b"{}", b'{"sha256": {}}', b"[", b'{"sha256": 3}'])
def test_verify_without_usable_checksums_fails(folder, content):
    (folder / "checksums.json").unlink()
    if content is not None:
        (folder / "checksums.json").write_bytes(content)
    TensorFolder(folder)
    with pytest.raises(CheckpointError, match="checksums"):
        TensorFolder(folder, verify=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "m.pkl"])
def test_files_that_run_code_are_refused_with_the_conversion(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="safe_serialization=True") as caught:
        TensorFolder(tmp_path)
    assert name in str(caught.value)


def test_folder_without_weights_and_path_that_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        TensorFolder(tmp_path)
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        TensorFolder("organization/model")
