# SPDX-License-Identifier: Apache-2.0
"""Place parameters, optimizer states, batches and caches on a mesh of devices.

Sharding is data: ordered `(path regex, spec)` rules, the first match wins, and a path without a
match is an error. A spec names the trailing dimensions, so stacked layers (leading axis L) and
unrolled ones share the rules. XLA inserts the communication (`AxisType.Auto`).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sqzjax.kvcache.states import CacheStates
from sqzjax.sharding_config import (
    AXES,
    BATCH_AXES,
    DEFAULT_RULES,
    SPATIAL_AXES,
    MeshConfig,
    Rule,
    check_rules,
)
from sqzjax.typing import PyTree

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "MeshConfig",
    "Rule",
    "batch_sharding",
    "cache_shardings",
    "check_batch",
    "check_rules",
    "check_unused",
    "field_sharding",
    "make_mesh",
    "mirror_shardings",
    "paths",
    "shardings",
    "specs",
]

_MAX_REPORTED = 20
_log = logging.getLogger(__name__)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with the axes `data`, `fsdp`, `tensor`; use it with `jax.set_mesh`.

    A configuration that splits fields adds `lat` and `lon`. A product below the number of devices
    takes the first ones.
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = config.axes(len(devices))
    count = math.prod(axes.values())
    if count < len(devices):
        _log.info("the mesh uses %d of %d devices", count, len(devices))
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=types, devices=devices[:count]
    )


def paths(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by `/`-joined path, in the order of `jax.tree.leaves`."""
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def specs(tree: PyTree, rules: tuple[Rule, ...] = ()) -> PyTree:
    """Return the tree of `PartitionSpec`s; `rules` come before `DEFAULT_RULES`.

    Leaves need a shape only. ValueError lists the paths that no rule matches and the leaves with
    fewer dimensions than their spec.
    """
    check_rules(rules)
    found, problems = [], []
    for path, leaf in paths(tree).items():
        spec = _first_match(path, (*rules, *DEFAULT_RULES))
        if spec is None:
            problems.append(f"{path} {tuple(leaf.shape)}: no rule matches")
        elif len(spec) > len(leaf.shape):
            problems.append(f"{path} {tuple(leaf.shape)}: fewer dimensions than its spec {spec}")
        else:
            found.append(PartitionSpec(*(None,) * (len(leaf.shape) - len(spec)), *spec))
    _raise("cannot shard; add a rule (path regex, axes) for", problems)
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def shardings(tree: PyTree, mesh: Mesh, rules: tuple[Rule, ...] = ()) -> PyTree:
    """Return the tree of `NamedSharding`s; ValueError names what does not divide evenly."""
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, rules))
    placed = paths(named)
    problems = [
        line
        for path, leaf in paths(tree).items()
        for line in _indivisible(path, tuple(leaf.shape), placed[path])
    ]
    _raise("these dimensions cannot be split evenly over the mesh:", problems)
    return named


def mirror_shardings(tree: PyTree, params: PyTree, param_shardings: PyTree, mesh: Mesh) -> PyTree:
    """Return shardings for a tree that contains copies of `params` at deeper paths.

    Optimizer moments and averages follow the parameter whose path ends theirs and whose shape they
    have; counters and factored moments are replicated.
    """
    placed_params = paths(param_shardings)
    known = {path: (tuple(leaf.shape), placed_params[path]) for path, leaf in paths(params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, replicated))
            if shape is not None:
                return sharding if shape == tuple(leaf.shape) else replicated
        return replicated

    placed = [place(path, leaf) for path, leaf in paths(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), placed)


def check_unused(rules: tuple[Rule, ...], *trees: PyTree) -> None:
    """Raise ValueError for rules that no leaf of any tree matches first."""
    names = [path for tree in trees for path in paths(tree)]
    for number, (pattern, spec) in enumerate(rules):
        taken = [name for name in names if re.search(pattern, name)]
        if not taken:
            raise ValueError(
                f"sharding rule ({pattern!r}, {spec}) matches no parameter; correct or remove it. "
                f"Paths look like {names[:3]}"
            )
        if all(_first_match(name, rules[:number]) is not None for name in taken):
            raise ValueError(
                f"sharding rule ({pattern!r}, {spec}) is hidden by the rules before it; remove it "
                "or move it up"
            )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of `[B, ...]` arrays: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def field_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Return the sharding of a column of `ndim` dimensions in a batch of gridded fields.

    Samples lie like rows of tokens; the last two dimensions of columns with at least four are
    latitude and longitude, split over those axes where the mesh has them.
    """
    spatial = tuple(axis for axis in SPATIAL_AXES if axis in mesh.shape)
    if not spatial or ndim < 4:
        return batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, *(None,) * (ndim - 3), *spatial))


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raise ValueError unless every microbatch splits evenly over the batch axes of the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    if batch_size % ways:
        below = batch_size // ways * ways
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of {ways} (data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} x accumulation={accumulation}); use "
            f"{f'{below} or ' if below else ''}{below + ways}"
        )


def cache_shardings(caches: CacheStates, mesh: Mesh | AbstractMesh, num_kv_heads: int) -> PyTree:
    """Return shardings for cache states: batch over the batch axes, kv heads over `tensor`.

    A dimension that does not divide stays whole: caches come in every shape, and replication costs
    memory, never correctness.
    """
    lead = 1 if caches.stacked else 0
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(leaf: Any) -> NamedSharding:
        spec: list[Any] = [None] * leaf.ndim
        if leaf.ndim > lead and leaf.shape[lead] % ways == 0:
            spec[lead] = BATCH_AXES
        heads = lead + 1
        per_head = leaf.ndim > heads + 1 and leaf.shape[heads] == num_kv_heads
        if per_head and num_kv_heads % mesh.shape["tensor"] == 0:
            spec[heads] = "tensor"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, caches)


def _first_match(path: str, rules: Sequence[Rule]) -> tuple[str | None, ...] | None:
    return next((spec for pattern, spec in rules if re.search(pattern, path)), None)


def _indivisible(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> list[str]:
    sizes: Mapping[str, int] = sharding.mesh.shape
    problems = []
    for axis, (size, name) in enumerate(zip(shape, sharding.spec)):
        if name is None or size % (ways := sizes[name]) == 0:
            continue
        below = size // ways * ways
        near = [n for n in range(max(1, ways // 2), 2 * ways) if size % n == 0]
        problems.append(
            f"{path} {shape}: size {size} of dimension {axis} is not a multiple of {name}={ways}; "
            f"use size {f'{below} or ' if below else ''}{below + ways}, or {name} in {near or [1]}"
        )
    return problems


def _raise(title: str, problems: list[str]) -> None:
    if not problems:
        return
    more = len(problems) - _MAX_REPORTED
    lines = problems[:_MAX_REPORTED] + ([f"... and {more} more"] if more > 0 else [])
    raise ValueError("\n  ".join([title, *lines]))
