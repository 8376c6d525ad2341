# SPDX-License-Identifier: Apache-2.0
"""Weights of training runs, as an evaluation reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sqzjax.errors import CheckpointError
from sqzjax.io import checkpoint, step_files
from sqzjax.typing import Params, PyTree


def trained_params(
    folder: Path,
    *,
    averaged: bool,
    expected: PyTree,
    convert: Callable[[Params], Params] = lambda params: params,
) -> Params:
    """Restore the parameters of a step folder, or their average of a run that kept one.

    CheckpointError if what `convert` makes of them lacks leaves of `expected`, has others, or other
    shapes.
    """
    params = convert(_average(folder) if averaged else _params(folder))
    if problems := _differences(expected, params):
        raise CheckpointError(f"{folder} does not fit its model: {'; '.join(problems[:20])}")
    return params


def _params(folder: Path) -> Params:
    return checkpoint.restore_params(folder).items["params"]


def _average(folder: Path) -> Params:
    arrays = step_files.read_meta(folder)["arrays"]["train"]
    abstract = {"train": step_files.abstract_nested(arrays)}
    steps = checkpoint.Checkpointer(folder.parent)
    return steps.restore(int(folder.name), abstract).items["train"]["average"]


def _differences(expected: Any, params: Params) -> list[str]:
    wanted, found = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (expected, params)
    )
    return [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
