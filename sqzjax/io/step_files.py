# SPDX-License-Identifier: Apache-2.0
"""What lies in the folder of one training step, written and read with orbax's v0 API.

`<step>/<item>/` holds one pytree as orbax stores nested dicts, `<step>/meta/metadata` is JSON with
the name, dtype and shape of every array. Only this file imports orbax, so a later switch to
another API stays here. Reading is strict: names, shapes and dtypes must match what is asked for.
"""

import json
import logging
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.errors import CheckpointError
from sqzjax.typing import PyTree

FORMAT_VERSION = 1
META = "meta"
TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"

Index = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of every array of one item, by its `/`-joined path."""

_MAX_REPORTED = 20
_ROOT = "value"  # name of the array when an item is one bare array
_ITEM_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Everything else (float8, int4, ...) is stored as bytes: not every storage driver knows it.
_NATIVE_DTYPES = frozenset(
    ("bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128")
    + tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
)


def to_host(items: Mapping[str, PyTree]) -> dict[str, dict[str, Any]]:
    """Copy every leaf to fresh host memory, keyed by path; later donation cannot touch the copy."""
    flat = {item: _flatten(item, tree) for item, tree in items.items()}
    for leaf in jax.tree.leaves(flat):
        if isinstance(leaf, jax.Array) and not _is_key(leaf):
            if not leaf.is_fully_addressable:
                raise CheckpointError("arrays spread over several processes cannot be saved yet")
            leaf.copy_to_host_async()
    return jax.tree.map(_host_copy, flat)


def describe(flat: Mapping[str, Any]) -> Index:
    """Return dtype and shape of every leaf of a flattened item."""
    return {name: (_dtype_name(leaf), tuple(np.shape(leaf))) for name, leaf in flat.items()}


def write_step(
    folder: Path,
    step: int,
    host_items: Mapping[str, dict[str, Any]],
    meta: dict[str, Any],
) -> None:
    """Write host copies and `meta` as step folder `folder`; it appears complete or not at all."""
    import orbax.checkpoint as ocp

    document = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "versions": _versions(),
        "arrays": {item: describe(flat) for item, flat in host_items.items()},
        "meta": meta,
    }
    arguments: dict[str, Any] = {META: ocp.args.JsonSave(document)}
    for item, flat in host_items.items():
        stored = {name: _encode(leaf) for name, leaf in flat.items() if np.size(leaf)}
        if stored:  # orbax has no empty trees and no arrays of size zero
            arguments[item] = ocp.args.PyTreeSave(_nest(stored))
    with _quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(folder, args=ocp.args.Composite(**arguments))


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the JSON document of a step: keys `step`, `versions`, `arrays`, `meta`."""
    path = folder / META / "metadata"
    try:
        document = json.loads(path.read_bytes())
        version = document["format_version"]
        if version == FORMAT_VERSION:
            document["arrays"] = {
                item: {name: (dtype, tuple(shape)) for name, (dtype, shape) in index.items()}
                for item, index in document["arrays"].items()
            }
            return document
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the metadata of a checkpoint: {error!r}") from error
    raise CheckpointError(
        f"{folder} has checkpoint format {version}, this version of sqzjax reads "
        f"{FORMAT_VERSION}; load it with the version that wrote it ({document.get('versions')})"
    )


def read_items(
    folder: Path, abstract_items: Mapping[str, PyTree], *, cast: bool = False
) -> dict[str, PyTree]:
    """Read the items named in `abstract_items`, each in the structure and sharding given there.

    Leaves without a sharding arrive on the default device; Python numbers stay Python numbers and
    numpy arrays numpy arrays. `cast` allows another dtype of the same kind.
    """
    stored = read_meta(folder)["arrays"]
    flat = {item: _flatten(item, tree) for item, tree in abstract_items.items()}
    _require_match(folder, stored, {item: describe(leaves) for item, leaves in flat.items()}, cast)
    arrays = _read_arrays(folder, stored, flat)
    return {
        item: jax.tree.unflatten(
            jax.tree.structure(tree),
            [
                _place(arrays[item].get(name), leaf, stored[item][name])
                for name, leaf in flat[item].items()
            ],
        )
        for item, tree in abstract_items.items()
    }


def abstract_nested(index: Index) -> dict[str, Any]:
    """Return the nested dict of `ShapeDtypeStruct` that a stored item consists of."""
    return _nest({n: jax.ShapeDtypeStruct(shape, d) for n, (d, shape) in index.items()})


def _read_arrays(
    folder: Path, stored: dict[str, Index], wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Read the arrays of all wanted items with one request; absent are those of size zero."""
    import orbax.checkpoint as ocp

    requests = {}
    for item, leaves in wanted.items():
        arguments = {
            name: _restore_argument(stored[item][name], leaf)
            for name, leaf in leaves.items()
            if 0 not in stored[item][name][1]
        }
        if arguments:
            requests[item] = ocp.args.PyTreeRestore(
                item=_nest(dict.fromkeys(arguments, 0)), restore_args=_nest(arguments)
            )
    if not requests:
        return {item: {} for item in wanted}
    with _quiet_orbax(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        try:
            nested = reader.restore(folder, args=ocp.args.Composite(**requests))
        except Exception as error:
            raise CheckpointError(f"cannot read {folder}: {error}") from error
    return {item: _flatten(item, nested[item]) if item in requests else {} for item in wanted}


def _restore_argument(entry: tuple[str, tuple[int, ...]], leaf: Any) -> Any:
    """Ask for a leaf with a sharding shard by shard on its devices, for any other on the host."""
    import orbax.checkpoint as ocp

    dtype, shape = entry
    sharding = _sharding(leaf)
    if dtype in _NATIVE_DTYPES and sharding is not None:
        return ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=shape, dtype=_dtype(leaf), strict=True
        )
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _place(stored: Any, leaf: Any, entry: tuple[str, tuple[int, ...]]) -> Any:
    """Turn what was read into what `leaf` asks for: type, dtype and place."""
    dtype, shape = entry
    if isinstance(stored, jax.Array):
        return stored
    if _is_key(leaf):
        data = jax.random.wrap_key_data(jnp.asarray(stored), impl=leaf.dtype)
        return data if _sharding(leaf) is None else jax.device_put(data, _sharding(leaf))
    array = np.zeros(shape, dtype) if stored is None else _decode(np.asarray(stored), dtype)
    if isinstance(leaf, bool | int | float):
        return type(leaf)(array.item())
    array = array.astype(_dtype(leaf), copy=False)
    if isinstance(leaf, np.ndarray | np.generic):
        return array
    if _sharding(leaf) is not None:
        return jax.device_put(array, _sharding(leaf))
    return jnp.array(array)


# Names and matching.


def _flatten(item: str, tree: PyTree) -> dict[str, Any]:
    """Return the leaves of `tree` by `/`-joined path, in the order of `jax.tree.leaves`."""
    if not _ITEM_NAME.fullmatch(item) or item == META:
        raise CheckpointError(f"item name {item!r} must be lower_case and not {META!r}")
    pairs = [
        (jax.tree_util.keystr(path, simple=True, separator="/") or _ROOT, leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    # Storage joins names with dots, and a name cannot be both an array and a folder of arrays.
    counts = Counter(name.replace("/", ".") for name, _ in pairs)
    folders = {parent.as_posix() for name, _ in pairs for parent in PurePosixPath(name).parents}
    for name, _ in pairs:
        if counts[name.replace("/", ".")] > 1 or name in folders:
            raise CheckpointError(f"item {item!r}: {name!r} clashes with another leaf's name")
    for name, leaf in pairs:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float):
            kind = type(leaf).__name__
            raise CheckpointError(f"{item}/{name} is a {kind}, not an array; put it into meta")
    return dict(pairs)


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def _require_match(
    folder: Path, stored: dict[str, Index], wanted: dict[str, Index], cast: bool
) -> None:
    """Raise one `CheckpointError` that lists every difference."""
    if absent := sorted(wanted.keys() - stored.keys()):
        raise CheckpointError(
            f"{folder} holds {', '.join(sorted(stored))} but not {', '.join(absent)}; "
            "to start from its parameters alone use sqzjax.io.checkpoint.restore_params"
        )
    problems = [line for item in wanted for line in _differences(stored, wanted, item, cast)]
    if not problems:
        return
    more = len(problems) - _MAX_REPORTED
    lines = problems[:_MAX_REPORTED] + ([f"... and {more} more"] if more > 0 else [])
    if all(_stacked(stored[item]) == _stacked(wanted[item]) for item in wanted):
        lines.append(
            "the only difference is the layer layout: convert with "
            "sqzjax.models.stack_layers or unstack_layers, or set scan_layers as in training"
        )
    raise CheckpointError("\n  ".join([f"{folder} does not fit:", *lines]))


def _differences(
    stored: dict[str, Index], wanted: dict[str, Index], item: str, cast: bool
) -> Iterator[str]:
    have, want = stored[item], wanted[item]
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            yield f"{item}/{name}: missing in the checkpoint, wanted {_text(want[name])}"
        elif name not in want:
            yield f"{item}/{name}: {_text(have[name])} in the checkpoint, not wanted"
        elif have[name][1] != want[name][1]:
            yield f"{item}/{name}: {_text(have[name])} stored, wanted {_text(want[name])}"
        elif have[name][0] != want[name][0] and not (cast and _castable(have[name], want[name])):
            yield (
                f"{item}/{name}: {_text(have[name])} stored, wanted {_text(want[name])}"
                f" ({'kinds differ' if cast else 'pass cast=True to convert'})"
            )


def _stacked(index: Index) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """Count arrays per layer, layer numbers and stacked axis removed, to compare layouts."""
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for name, (dtype, shape) in index.items():
        plain = re.sub(r"(^|/)layers_\d+/", r"\1layers/", name)
        if plain == name and re.search(r"(^|/)layers/", name) and shape:
            counts[plain, dtype, shape[1:]] += shape[0]
        else:
            counts[plain, dtype, shape] += 1
    return counts


def _text(entry: tuple[str, tuple[int, ...]]) -> str:
    return f"{entry[0]}[{','.join(map(str, entry[1]))}]"


def _castable(have: tuple[str, Any], want: tuple[str, Any]) -> bool:
    if have[0].startswith("key<") or want[0].startswith("key<"):
        return False
    kinds = (jnp.floating, jnp.integer, jnp.complexfloating)
    return any(
        jnp.issubdtype(jnp.dtype(have[0]), kind) and jnp.issubdtype(jnp.dtype(want[0]), kind)
        for kind in kinds
    )


# Leaves.


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.dtype(bool)), jax.dtypes.prng_key)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _dtype_name(leaf: Any) -> str:
    return str(_dtype(leaf))


def _sharding(leaf: Any) -> Any:
    """Return where a leaf must go; None = anywhere (an uncommitted array has no say)."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _host_copy(leaf: Any) -> Any:
    if _is_key(leaf):
        return leaf.copy()  # a few bytes; turned into numbers when written
    return np.array(leaf, copy=True)  # a view, as CPU arrays give, would block donation


def _encode(leaf: Any) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else leaf
    return array if str(array.dtype) in _NATIVE_DTYPES else array.view(np.uint8)


def _decode(array: np.ndarray, dtype: str) -> np.ndarray:
    return array if dtype in _NATIVE_DTYPES else array.view(jnp.dtype(dtype))


# Orbax's surroundings.


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("sqzjax", "jax", "orbax-checkpoint"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"  # run from a checkout that is not installed
    return found


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Hide orbax's messages, leaving all other logging alone.

    They are tens of lines per save; what fails is raised, too, and reported by who called.
    """
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
