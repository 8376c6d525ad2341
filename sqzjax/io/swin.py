# SPDX-License-Identifier: Apache-2.0
"""Swin emulators in and out, with the tensor names of the code of arXiv 2603.25687.

A folder holds `config.json` and `model.safetensors`. `load` checks every name and shape against the
configuration before it allocates anything; loading what `save` wrote is bit-identical. What the
original configuration has no words for (grid layout, GELU, eps) stands under the key "sqzjax".
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.typing import DTypeLike

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import strict_json
from sqzjax.io.fields import Fields, show
from sqzjax.io.hf_names import flatten, insert
from sqzjax.io.new_folder import CONFIG, check_target, new_folder
from sqzjax.io.safetensors import TensorSpec
from sqzjax.io.shards import TensorFolder, check_folder, listed, write_folder, write_json
from sqzjax.models.config import Execution
from sqzjax.models.layout import unstack_layers
from sqzjax.models.swin_config import COORDINATES, TORCH_EPS, Shapes, SwinConfig, swin_shapes
from sqzjax.sphere.grid import Grid, Layout
from sqzjax.typing import Params

_EXTENSION = "sqzjax"
_MOST = 1 << 20
"""Several times any size there is; beyond it a file is taken for damaged."""
_INTEGERS = {
    "in_channels": "in_chans",
    "out_channels": "out_chans",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "context": "temporal_context_window_size",
    "patch_size": "patch_size",
}
_BLOCK = {
    "attn_norm/scale": "norm1.norm.weight",
    "attn/q/kernel": "attn.q.weight",
    "attn/q/bias": "attn.biasq.bias",
    "attn/k/kernel": "attn.k.weight",
    "attn/k/bias": "attn.biask.bias",
    "attn/v/kernel": "attn.v.weight",
    "attn/v/bias": "attn.biasv.bias",
    "attn/o/kernel": "attn.proj.weight",
    "attn/o/bias": "attn.biasproj.bias",
    "attn/q_norm/scale": "attn.q_norm.norm.weight",
    "attn/k_norm/scale": "attn.k_norm.norm.weight",
    "mlp_norm/scale": "norm2.norm.weight",
    "mlp/up/kernel": "mlp.fc1.weight",
    "mlp/up/bias": "mlp.bias1.bias",
    "mlp/down/kernel": "mlp.fc2.weight",
    "mlp/down/bias": "mlp.bias2.bias",
}
_OTHERS = {
    "patch/kernel": "patch_embed.proj.conv.weight",
    "patch/bias": "patch_embed.proj.conv.bias",
    "position/kernel": "pos_embed.proj.conv.weight",
    "position/bias": "pos_embed.proj.conv.bias",
    "position/table": "pos_embed",
    "head/kernel": "head.weight",
}


def read_config(path: str | os.PathLike[str]) -> SwinConfig:
    """Read `config.json` of a folder; ConfigError lists every problem."""
    check_folder(Path(path))
    file = Path(path) / CONFIG
    fields = Fields(strict_json.read(file))
    values: dict[str, Any] = {ours: _integer(fields, theirs) for ours, theirs in _INTEGERS.items()}
    fields.only("arch", "swin", required=True)
    fields.only("use_big_skip_conv", False)
    values["window"] = _two(fields, "window_size")
    values["mlp_ratio"] = fields.number("mlp_ratio", 4.0)
    values["position"] = fields.boolean("coord_pos_embed", True)
    values |= _extension(fields, _two(fields, "img_size"))
    try:
        if not fields.problems:
            return SwinConfig(**values)
    except ValueError as error:
        fields.problem(str(error))
    raise ConfigError(f"{file}: {problem}" for problem in fields.problems)


def _integer(fields: Fields, name: str) -> int:
    if fields.raw.get(name) is None:
        usual = " (embed_dim / 64 as published)" if name == "num_heads" else ""
        fields.problem(f"{name} is missing; set it to what the model was trained with{usual}")
        return 1
    return fields.integer(name, 1, _MOST)


def _two(fields: Fields, name: str) -> tuple[int, int]:
    """Read rows and columns; one number stands for both."""
    value = fields.raw.get(name)
    pair: list[Any] = value if isinstance(value, list) else [value, value]
    if len(pair) == 2 and all(type(size) is int and 1 <= size <= _MOST for size in pair):
        return pair[0], pair[1]
    fields.problem(
        f"{name}={show(value)} must be two integers >= 1, rows and columns; img_size counts points "
        "([720, 1440] as published), window_size patches ([9, 18])"
    )
    return 2, 2


def _extension(fields: Fields, size: tuple[int, int]) -> dict[str, Any]:
    """Read what the original has no words for; without it, ERA5's grid and PyTorch's defaults."""
    extra = fields.sub(_EXTENSION)
    if unknown := sorted(extra.raw.keys() - {"grid", "gelu", "norm_eps"}):
        fields.problem(f"{_EXTENSION} has {show(unknown)}; it may have grid, gelu and norm_eps")
    grid: dict[str, Any] = {"layout": "no_south_pole"}
    found = extra.raw.get("grid", grid)
    if not isinstance(found, dict) or found.keys() - {"layout", "north", "west", "spacing"}:
        fields.problem(f"{_EXTENSION}.grid={show(found)} must have layout, north, west, spacing")
        found = grid
    if found.get("layout") not in get_args(Layout):
        fields.problem(
            f"{_EXTENSION}.grid.layout={show(found.get('layout'))} is none of "
            + listed(get_args(Layout))
        )
        found = grid
    gelu = extra.raw.get("gelu", "erf")
    if gelu not in ("erf", "tanh"):
        fields.problem(f"{_EXTENSION}.gelu={show(gelu)} must be 'erf' or 'tanh'")
    values = {"gelu": gelu, "norm_eps": extra.number("norm_eps", TORCH_EPS)}
    try:
        return values | {"grid": Grid(latitudes=size[0], longitudes=size[1], **found)}
    except (ValueError, TypeError) as error:
        fields.problem(f"{_EXTENSION}.grid: {error}")
        return values


def load(
    path: str | os.PathLike[str],
    *,
    execution: Execution = Execution(),
    dtype: DTypeLike | None = None,
    shardings: Any = None,
    verify: bool = False,
) -> tuple[SwinConfig, Params]:
    """Load a folder into the parameter layout of `execution`.

    `dtype=None` keeps each tensor's stored dtype; `shardings` is a tree like the parameters.
    `verify` first hashes the files against `checksums.json`. ConfigError lists what is wrong with
    `config.json`, CheckpointError every missing, unexpected and misshapen tensor.
    """
    config = read_config(path)
    folder = TensorFolder(path, verify=verify)
    shapes = swin_shapes(config, scan_layers=False)
    _check_tensors(folder, config, shapes)
    layers = range(config.depth)
    params: Params = {}
    for leaf, shape in swin_shapes(config, execution.scan_layers).items():
        own = [leaf]
        if leaf.startswith("layers/"):
            own = [leaf.replace("layers", f"layers_{layer}", 1) for layer in layers]
        parts = [_parameter(folder, path, shapes[path]) for path in own]
        value = parts[0] if own == [leaf] else np.stack(parts)
        # A copy: an array on the device must not go on looking at the mapped file.
        insert(params, leaf, np.array(value.reshape(shape), dtype or value.dtype, order="C"))
    return config, jax.device_put(params, shardings)


def _name(path: str) -> str:
    """Return the tensor of an unrolled parameter."""
    if not path.startswith("layers_"):
        return _OTHERS[path]
    layer, _, rest = path.removeprefix("layers_").partition("/")
    return f"blocks.{layer}.{_BLOCK[rest]}"


def _stored_shape(path: str, shape: tuple[int, ...], config: SwinConfig) -> tuple[int, ...]:
    if path in ("patch/kernel", "position/kernel"):
        channels = config.in_channels if path == "patch/kernel" else COORDINATES
        return shape[1], channels, config.patch_size, config.patch_size
    if path == "position/table":
        return 1, *shape
    return shape[::-1]


def _check_tensors(folder: TensorFolder, config: SwinConfig, shapes: Shapes) -> None:
    expected = {_name(path): _stored_shape(path, shape, config) for path, shape in shapes.items()}
    found = folder.tensors
    lists = {
        "missing": sorted(expected.keys() - found),
        "unexpected": sorted(found.keys() - expected.keys()),
        "with a wrong shape": [
            f"{name} is {list(found[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "that are not floating point": [
            f"{name} ({info.dtype})"
            for name, info in found.items()
            if not jax.numpy.issubdtype(info.dtype, np.floating)
        ],
    }
    problems = [f"{len(v)} tensors {kind}: {listed(v)}" for kind, v in lists.items() if v]
    if any(name.startswith("pos_embed") for name in expected.keys() ^ found.keys()):
        told = str(config.position).lower()
        problems.append(
            f"coord_pos_embed is {told} in {CONFIG}; pos_embed.proj.conv.* go with true, pos_embed "
            "alone with false"
        )
    if problems:
        raise CheckpointError("\n".join(f"{folder.path}: {problem}" for problem in problems))


def _parameter(folder: TensorFolder, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read one unrolled parameter; linear weights are stored `[out, in]`."""
    values = folder.read(_name(path))
    if path == "position/table":
        return values.reshape(shape)
    return values.reshape(values.shape[0], -1).T if len(shape) == 2 else values


def save(
    path: str | os.PathLike[str],
    config: SwinConfig,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `load` reads; parameters stacked or unrolled.

    The folder appears whole or not at all. An existing non-empty one is refused, or replaced with
    `overwrite` if it holds a checkpoint.
    """
    target = Path(path).resolve()
    check_target(target, overwrite)
    flat = flatten(unstack_layers(params))
    shapes = swin_shapes(config, scan_layers=False)
    found = {path: tuple(np.shape(leaf)) for path, leaf in flat.items()}
    if found != shapes:
        wrong = sorted(p for p in found.keys() | shapes.keys() if found.get(p) != shapes.get(p))
        raise ValueError(f"params do not fit the config: {listed(wrong)}")
    with new_folder(target) as folder:
        write_folder(folder, _specs(flat, config, dtype), 5 << 30)
        write_json(folder / CONFIG, _config(config))


def _specs(
    flat: Mapping[str, Any], config: SwinConfig, dtype: DTypeLike | None
) -> list[TensorSpec]:
    specs = []
    for path, leaf in flat.items():
        kind = np.dtype(leaf.dtype if dtype is None else dtype)
        shape = _stored_shape(path, leaf.shape, config)
        specs.append(TensorSpec(_name(path), kind, shape, partial(_stored, leaf, shape, kind)))
    return specs


def _stored(leaf: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    values = np.asarray(leaf)
    values = values.T if values.ndim == 2 else values
    return np.ascontiguousarray(values.reshape(shape).astype(dtype))


def _config(config: SwinConfig) -> dict[str, Any]:
    grid = config.grid
    own = {"layout": grid.layout, "north": grid.north, "west": grid.west, "spacing": grid.spacing}
    return {
        "arch": "swin",
        "img_size": list(grid.shape),
        **{theirs: getattr(config, ours) for ours, theirs in _INTEGERS.items()},
        "num_heads": config.heads,
        "window_size": list(config.window_size),
        "mlp_ratio": config.mlp_ratio,
        "coord_pos_embed": config.position,
        _EXTENSION: {"grid": own, "gelu": config.gelu, "norm_eps": config.norm_eps},
    }
