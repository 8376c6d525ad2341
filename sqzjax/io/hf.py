# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints in and out: a folder of `config.json` and safetensors.

`load` checks names, shapes and dtypes against the configuration before it allocates anything, then
reads one parameter at a time from the memory map, each device only its own slice: the host never
holds more than one parameter. `save` writes transformers' names and layout, one tensor at a time.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import hf_config, strict_json
from sqzjax.io.hf_names import Source, flatten, head_name, insert, sources
from sqzjax.io.new_folder import CONFIG, check_target, new_folder
from sqzjax.io.safetensors import TensorSpec
from sqzjax.io.shards import (
    CHECKSUMS,
    INDEX,
    TensorFolder,
    check_folder,
    listed,
    write_folder,
    write_json,
)
from sqzjax.models.config import Execution, ModelConfig
from sqzjax.models.hf_map import IGNORED
from sqzjax.models.shapes import Shapes, param_shapes
from sqzjax.typing import Params, PyTree

_GENERATION = "generation_config.json"
_NATIVE = ("float32", "bfloat16", "float16")
_ROWS_COMPARED = 4096
_TRANSPOSED_ROWS = 64


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read `config.json` of a checkpoint folder (stop ids of `generation_config.json` merged)."""
    check_folder(Path(path))
    file = Path(path) / CONFIG
    generation = Path(path) / _GENERATION
    raw = strict_json.read(file)
    try:
        return hf_config.from_hf(raw, strict_json.read(generation) if generation.exists() else None)
    except ConfigError as error:
        raise ConfigError(f"{file}: {problem}" for problem in error.problems) from None


def load(
    path: str | os.PathLike[str],
    *,
    execution: Execution = Execution(),
    dtype: DTypeLike | None = None,
    shardings: PyTree = None,
    verify: bool = False,
) -> tuple[ModelConfig, Params]:
    """Load a checkpoint folder into the parameter layout of `execution`.

    `dtype=None` keeps each tensor's stored dtype. `shardings`: a tree of `jax.sharding.Sharding`
    like the parameters, or None for the default device. `verify` first hashes the files against
    `checksums.json`. Unknown, missing and misshapen tensors are errors that list all of them; a
    tied head may be absent or an exact copy of the embedding.
    """
    config = read_config(path)
    folder = TensorFolder(path, verify=verify)
    shapes = param_shapes(config, execution.scan_layers)
    origins = sources(config, shapes)
    _check_tensors(folder, config, shapes, origins, dtype)
    targets = _flat_shardings(shardings, shapes)
    params: Params = {}
    for leaf, shape in shapes.items():
        insert(params, leaf, _place(folder, origins[leaf], shape, dtype, targets[leaf]))
    return config, params


def _check_tensors(
    folder: TensorFolder,
    config: ModelConfig,
    shapes: Shapes,
    origins: Mapping[str, Source],
    dtype: DTypeLike | None,
) -> None:
    expected = {
        name: source.stored_shape(shapes[path])
        for path, source in origins.items()
        for name in source.names
    }
    found = {n for n in folder.tensors if not any(re.fullmatch(rule, n) for rule in IGNORED)}
    tied = {head_name(config)} & found if config.tie_embeddings else set()
    lists = {
        "missing": sorted(expected.keys() - found),
        "unexpected": sorted(found - expected.keys() - tied),
        "with a wrong shape": [
            f"{name} is {list(folder.tensors[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and folder.tensors[name].shape != shape
        ],
    }
    problems = [f"{len(v)} tensors {kind}: {listed(v)}" for kind, v in lists.items() if v]
    problems += _dtype_problems(folder, origins, found, dtype)
    if not problems:
        embedding = origins["embed/embedding"].names[0]
        problems = [_untied(head, embedding) for head in tied if _differ(folder, head, embedding)]
    if problems:
        raise CheckpointError("\n".join(f"{folder.path}: {problem}" for problem in problems))


def _untied(head: str, embedding: str) -> str:
    return (
        f"{head} differs from {embedding} although the config ties them; set tie_word_embeddings "
        "(llada: weight_tying) to false in config.json, or remove the tensor"
    )


def _differ(folder: TensorFolder, first: str, second: str) -> bool:
    """Compare two tensors bit by bit, a block of rows at a time."""
    one, other = folder.tensors[first], folder.tensors[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return True
    for row in range(0, one.shape[0], _ROWS_COMPARED):
        rows = (slice(row, row + _ROWS_COMPARED),)
        if folder.read(first, rows).tobytes() != folder.read(second, rows).tobytes():
            return True
    return False


def _dtype_problems(
    folder: TensorFolder,
    origins: Mapping[str, Source],
    found: set[str],
    dtype: DTypeLike | None,
) -> list[str]:
    problems = []
    for path, source in origins.items():
        stored = {str(folder.tensors[name].dtype) for name in source.names if name in found}
        if not all(jnp.issubdtype(name, jnp.floating) for name in stored):
            problems.append(f"{path} is stored as {listed(sorted(stored))}, not as floating point")
        elif dtype is None and (len(stored) > 1 or not stored <= set(_NATIVE)):
            problems.append(f"{path} is stored as {listed(sorted(stored))}; choose a dtype to load")
    return [listed(problems, "; ")] if problems else []


def _flat_shardings(shardings: PyTree, shapes: Shapes) -> dict[str, Any]:
    if shardings is None:
        return dict.fromkeys(shapes)
    flat = flatten(shardings)
    if flat.keys() != shapes.keys():
        raise ValueError(
            f"shardings must mirror the parameters; missing: "
            f"{listed(sorted(shapes.keys() - flat.keys())) or 'none'}; unexpected: "
            f"{listed(sorted(flat.keys() - shapes.keys())) or 'none'}"
        )
    return flat


def _place(
    folder: TensorFolder,
    source: Source,
    shape: tuple[int, ...],
    dtype: DTypeLike | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    """Create one parameter on its devices, each of them reading its own slice."""
    target = np.dtype(folder.tensors[source.names[0]].dtype if dtype is None else dtype)
    if sharding is None:
        return jax.device_put(_read(folder, source, target, tuple(slice(0, n) for n in shape)))
    blocks: dict[tuple, np.ndarray] = {}  # devices holding the same slice share one read

    def block(index: Any) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        if key not in blocks:
            blocks[key] = _read(folder, source, target, tuple(slice(*bounds) for bounds in key))
        return blocks[key]

    return jax.make_array_from_callback(shape, sharding, block, dtype=target)


def _read(
    folder: TensorFolder, source: Source, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """Return a slice of a parameter as a new array (never a view of the file)."""
    layers, inner = (index[0], index[1:]) if source.stacked else (slice(0, 1), index)
    names = source.names[layers]
    sizes = tuple(part.stop - part.start for part in inner)
    values = np.empty((len(names), *sizes), dtype)
    for row, name in zip(values, names):
        stored = folder.read(name, inner[::-1] if source.transpose else inner)
        if source.transpose:
            _copy_transposed(row, stored)
        else:
            row[...] = stored
    return values if source.stacked else values[0]


def _copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """Copy `source.T` into `target`, in strips that stay in the cache (2 to 8 times as fast)."""
    for start in range(0, source.shape[0], _TRANSPOSED_ROWS):
        strip = slice(start, start + _TRANSPOSED_ROWS)
        target[:, strip] = source[strip].T


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5 << 30,
    tokenizer_files: Sequence[str | os.PathLike[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers and `load` read; parameters stacked or unrolled.

    `dtype=None` keeps each parameter's dtype; loading it back is then bit-identical. The folder
    appears whole or not at all. An existing non-empty one is refused, or replaced with
    `overwrite` if it holds a checkpoint.
    """
    target = Path(path).resolve()
    extra = [Path(file) for file in tokenizer_files or ()]
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be >= 1; 5 << 30 is usual")
    with _named_errors(target):
        check_target(target, overwrite)
    _check_extra(extra)
    flat = flatten(params)
    shapes = param_shapes(config, scan_layers="layers" in params)
    _check_params(flat, shapes)
    stored = np.dtype(flat["embed/embedding"].dtype if dtype is None else dtype)
    raw = hf_config.to_hf(config, dtype=stored.name)
    specs = _specs(flat, sources(config, shapes), dtype)
    with ExitStack() as stack:
        with _named_errors(target):
            folder = stack.enter_context(new_folder(target))
        write_folder(folder, specs, max_shard_bytes)
        for file in extra:
            shutil.copyfile(file, folder / file.name)
        ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / _GENERATION, {"_from_model_config": True} | ids)
        write_json(folder / CONFIG, raw)


@contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    """Name the folder in errors of the file system, as where a parent is a file or read-only."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; choose a folder below "
            "one that may be written to"
        ) from error


def _check_extra(files: Sequence[Path]) -> None:
    """Refuse extra files that do not exist or would take the place of one that is written."""
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"tokenizer file {file} does not exist")
        if file.suffix == ".safetensors" or file.name in (
            CONFIG,
            _GENERATION,
            INDEX,
            CHECKSUMS,
        ):
            raise ValueError(f"{file.name} is written from params and config; pass other files")


def _check_params(flat: Mapping[str, Any], shapes: Shapes) -> None:
    wrong = [
        f"{path} is {list(np.shape(flat[path]))}, expected {list(shape)}"
        for path, shape in shapes.items()
        if path in flat and np.shape(flat[path]) != shape
    ]
    problems = [f"missing {path}" for path in shapes if path not in flat]
    problems += [f"unexpected {path}" for path in flat if path not in shapes] + wrong
    problems += [
        f"{path} is spread over other processes; gather it first"
        for path, leaf in flat.items()
        if not getattr(leaf, "is_fully_addressable", True)
    ]
    if problems:
        raise ValueError(f"params do not fit the config: {listed(problems, '; ')}")


def _specs(
    flat: Mapping[str, Any], origins: Mapping[str, Source], dtype: DTypeLike | None
) -> list[TensorSpec]:
    """Return the tensors to write, in transformers' order."""
    ranked = []
    for path, source in origins.items():
        leaf = flat[path]
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        shape = source.stored_shape(leaf.shape)
        for layer, name in enumerate(source.names):
            read = partial(_stored, leaf, layer, source, kind)
            ranked.append((source.rank + layer, TensorSpec(name, kind, shape, read)))
    return [spec for _, spec in sorted(ranked, key=lambda item: item[0])]


def _stored(leaf: Any, layer: int, source: Source, dtype: np.dtype) -> np.ndarray:
    """Bring one tensor to the host, in the layout of the file."""
    values = np.asarray(leaf[layer] if source.stacked else leaf)
    stored = np.empty(source.stored_shape(leaf.shape), dtype)
    if source.transpose:
        _copy_transposed(stored, values)
    else:
        stored[...] = values
    return stored
