# SPDX-License-Identifier: Apache-2.0
"""Which tensors of a Hugging Face checkpoint fill which parameter, for both parameter layouts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqzjax.errors import ConfigError
from sqzjax.models.config import ModelConfig
from sqzjax.models.hf_map import TABLES
from sqzjax.models.shapes import Shapes
from sqzjax.typing import Params, PyTree


class Source(NamedTuple):
    """Tensors that fill one parameter: one, or one per layer of a stacked parameter.

    `rank` orders tensors as transformers does: embedding -1, layer i, then the number of layers.
    For a stacked parameter it is that of the first tensor.
    """

    names: tuple[str, ...]
    transpose: bool
    stacked: bool
    rank: int

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of each tensor, from that of the parameter."""
        shape = shape[1:] if self.stacked else shape
        return shape[::-1] if self.transpose else shape


def sources(config: ModelConfig, shapes: Shapes) -> dict[str, Source]:
    """Return the source of each parameter in `shapes`, stacked or unrolled, in table order."""
    found: dict[str, Source] = {}
    layers = range(config.num_layers)
    for source, path, transpose in TABLES[config.family]:
        names = tuple(source.format(layer=layer) for layer in layers)
        if not path.startswith("layers/"):
            rank = -1 if path.startswith("embed/") else config.num_layers
            found[path] = Source(names[:1], transpose, False, rank)
        elif path in shapes:
            found[path] = Source(names, transpose, True, 0)
        else:
            for layer in layers:
                own_path = path.replace("layers", f"layers_{layer}", 1)
                found[own_path] = Source(names[layer : layer + 1], transpose, False, layer)
    unnamed = sorted(shapes.keys() - found.keys())
    if unnamed:
        raise ConfigError(f"family={config.family!r} has no Hugging Face name for {unnamed[:20]}")
    return {path: source for path, source in found.items() if path in shapes}


def head_name(config: ModelConfig) -> str:
    """Return the name of the head, also where it is tied and need not exist."""
    return next(row.source for row in TABLES[config.family] if row.path == "head/kernel")


def flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested dict by slash-joined path."""
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    leaves = {}
    for name, value in tree.items():
        leaves |= flatten(value, f"{prefix}{name}/")
    return leaves


def insert(params: Params, path: str, value: Any) -> None:
    """Set the leaf at a slash-joined path, creating the dicts above it."""
    *parents, last = path.split("/")
    for name in parents:
        params = params.setdefault(name, {})
    params[last] = value
