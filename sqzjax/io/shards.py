# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: one file, or shards with an index, seen as one mapping of tensors.

Everything a folder may lie about is checked when it is opened: shards outside the folder (by name
or by symlink), missing shards, tensors in two shards, an index that disagrees with its shards.
Opening reads headers only; `verify` also hashes every shard against `checksums.json`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sqzjax.errors import CheckpointError
from sqzjax.io import strict_json
from sqzjax.io.safetensors import SafetensorsFile, TensorInfo, TensorSpec, write

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "checksums.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_LISTED = 20


class TensorFolder:
    """Tensors of a checkpoint folder: `tensors` by name, `read` one or a slice of one."""

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False):
        self.path = Path(path)
        names = _shard_names(self.path)
        for name in names:
            _check_inside(self.path, name)
        if verify:
            _verify(self.path, names)
        self._files = {name: SafetensorsFile(self.path / name) for name in names}
        self._shard_of = self._merge()
        self.tensors: dict[str, TensorInfo] = {
            name: self._files[shard].tensors[name] for name, shard in self._shard_of.items()
        }

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Return a tensor, or a slice of it, as a read-only view of the mapped file."""
        return self._files[self._shard_of[name]].read(name, index)

    def _merge(self) -> dict[str, str]:
        """Return the shard of each tensor, after comparing the index with what the shards hold."""
        found: dict[str, str] = {}
        problems = []
        for shard, file in self._files.items():
            for name in file.tensors:
                if name in found:
                    problems.append(f"{name!r} is in {found[name]} and in {shard}")
                found[name] = shard
        if SINGLE not in self._files:
            claimed = _weight_map(self.path)
            problems += [
                f"{name!r} is not in {shard}, where {INDEX} puts it"
                for name, shard in claimed.items()
                if name not in self._files[shard].tensors
            ]
            problems += [
                f"{name!r} in {shard} is not in {INDEX}"
                for name, shard in found.items()
                if name not in claimed
            ]
        if problems:
            raise CheckpointError(f"{self.path}: {listed(problems, '; ')}")
        return found


def listed(items: Iterable[str], separator: str = ", ") -> str:
    """Join the first 20 items and say how many more there are."""
    items = list(items)
    more = f"{separator}and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return separator.join(items[:_MAX_LISTED]) + more


def check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder on this machine, such as the name of a remote model."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; give the local folder that holds config.json and the "
            "safetensors files (nothing is downloaded)"
        )


def _shard_names(folder: Path) -> list[str]:
    check_folder(folder)
    if os.path.lexists(folder / SINGLE):
        return [SINGLE]
    if not os.path.lexists(folder / INDEX):
        raise CheckpointError(_nothing_to_read(folder))
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not os.path.lexists(folder / name)]
    if missing:
        raise CheckpointError(f"{folder} lacks shards that {INDEX} names: {listed(missing)}")
    return names


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = strict_json.read(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} must hold a non-empty object 'weight_map'")
    wrong = {repr(name) for name in weight_map.values() if not _is_plain_name(name)}
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX} names shards that are not plain .safetensors file names: "
            f"{listed(sorted(wrong))}"
        )
    return weight_map


def _is_plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and not any(separator in name for separator in "/\\:")
    )


def _check_inside(folder: Path, name: str) -> None:
    """Refuse symlinks that leave the folder, but for the blobs of a download cache.

    Hugging Face's cache holds `snapshots/<revision>/model.safetensors -> ../../blobs/<hash>`.
    """
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(folder / name))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(f"{folder / name} is a link to {target}, outside the folder")


def _nothing_to_read(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if not names:
        return f"{folder} holds neither {SINGLE} nor {INDEX}"
    return (
        f"{folder} holds only {listed(names)}: such files run code when they are read and are "
        "refused. Convert them where you trust their origin, with transformers: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET, "
        "safe_serialization=True)"
    )


def _verify(folder: Path, names: Sequence[str]) -> None:
    if not (folder / CHECKSUMS).exists():
        raise CheckpointError(f"{folder} has no {CHECKSUMS} to verify against; use verify=False")
    expected = strict_json.read(folder / CHECKSUMS).get("sha256")
    if not isinstance(expected, dict):
        raise CheckpointError(f"{folder / CHECKSUMS} must hold an object 'sha256'")
    damaged = [name for name in names if expected.get(name) != _sha256(folder / name)]
    if damaged:
        raise CheckpointError(f"{folder}: sha256 differs from {CHECKSUMS} for {listed(damaged)}")


def _sha256(path: Path) -> str:
    strict_json.regular_size(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: Path, tensors: Sequence[TensorSpec], max_shard_bytes: int) -> None:
    """Write tensors in their order as `model.safetensors`, or as shards and an index.

    A shard never exceeds `max_shard_bytes` unless one tensor does. `checksums.json` is added.
    """
    shards = _split(tensors, max_shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    digests = {
        name: write(folder / name, shard, {"format": "pt"}) for name, shard in zip(names, shards)
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in tensors)},
            "weight_map": {s.name: name for name, shard in zip(names, shards) for s in shard},
        }
        write_json(folder / INDEX, index)
    write_json(folder / CHECKSUMS, {"sha256": digests})


def _split(tensors: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_json(path: Path, value: object) -> None:
    """Write indented JSON and force it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
