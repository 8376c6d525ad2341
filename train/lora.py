# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (arXiv 2106.09685): train `a @ b` beside frozen kernels.

An adapter is a tree of its own that mirrors the paths of the kernels it sits beside, so optimizer
states exist for it alone. `b` is stored without the factor alpha / rank; `scaled` folds it in just
before the forward pass, which costs as much as the adapter is small.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.errors import CheckpointError
from sqzjax.io import safetensors
from sqzjax.sharding import paths
from sqzjax.typing import Key, Params, PyTree
from train.config import LoRAConfig

_FORMAT = "sqzjax_lora"


def init(config: LoRAConfig, params: PyTree, key: Key) -> Params:
    """Return an adapter: `a` normal with fan-in variance, `b` zero, so nothing changes at first.

    `params` may be abstract. ValueError if `targets` matches no linear layer.
    """
    adapter: Params = {}
    for number, (path, kernel) in enumerate(_targets(config, params).items()):
        *lead, inputs, outputs = kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, number), (*lead, inputs, config.rank))
        b = jnp.zeros((*lead, config.rank, outputs), jnp.float32)
        _insert(adapter, path, {"a": a * inputs**-0.5, "b": b})
    return adapter


def scaled(config: LoRAConfig, adapter: Params) -> Params:
    """Return the adapter as the model takes it, alpha / rank folded into `b`."""
    factor = config.alpha / config.rank
    return _map_pairs(adapter, lambda pair: {"a": pair["a"], "b": pair["b"] * factor})


def merge(config: LoRAConfig, params: Params, adapter: Params) -> Params:
    """Return parameters with `kernel + alpha / rank * a @ b`, equal to applying the adapter."""
    merged = {}
    for name, node in params.items():
        beside = adapter.get(name)
        if beside is None:
            merged[name] = node
        elif "a" in beside:
            product = jnp.matmul(beside["a"], beside["b"], precision="highest")
            kernel = node["kernel"] + (config.alpha / config.rank) * product
            merged[name] = {**node, "kernel": kernel.astype(node["kernel"].dtype)}
        else:
            merged[name] = merge(config, node, beside)
    return merged


def save(path: str | Path, config: LoRAConfig, adapter: Params) -> None:
    """Write an adapter as one safetensors file with its settings in the header."""
    tensors = [
        safetensors.TensorSpec(name, np.dtype(leaf.dtype), leaf.shape, partial(np.asarray, leaf))
        for name, leaf in paths(adapter).items()
    ]
    settings = {"rank": str(config.rank), "alpha": str(config.alpha), "targets": config.targets}
    safetensors.write(path, tensors, {"format": _FORMAT, **settings})


def load(path: str | Path) -> tuple[LoRAConfig, Params]:
    """Read what `save` wrote."""
    file = safetensors.SafetensorsFile(path)
    header = file.metadata
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not an adapter written by train.lora.save")
    adapter: Params = {}
    for name in file.tensors:
        _insert(adapter, name, jnp.array(file.read(name)))
    rank, alpha, targets = int(header["rank"]), float(header["alpha"]), header["targets"]
    return LoRAConfig(rank=rank, alpha=alpha, targets=targets), adapter


def _insert(tree: Params, path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _targets(config: LoRAConfig, params: PyTree) -> dict[str, Any]:
    """Return the kernels to adapt by the path of their linear layer."""
    linear = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in paths(params).items()
        if path.startswith("layers") and path.endswith("/kernel")
    }
    chosen = {path: leaf for path, leaf in linear.items() if re.search(config.targets, path)}
    if not chosen:
        raise ValueError(
            f"lora.targets={config.targets!r} matches no linear layer; they are {sorted(linear)}"
        )
    return chosen


def _map_pairs(tree: Params, change: Any) -> Params:
    if "a" in tree:
        return change(tree)
    return {name: _map_pairs(node, change) for name, node in tree.items()}
