# SPDX-License-Identifier: Apache-2.0
"""Order of a GPU kernel's accesses and synchronisations, and kernels that lack one of them."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_WATCHED = {
    "barrier_wait": "wait",
    "commit_smem": "commit",
    "copy_gmem_to_smem": "load",
    "copy_smem_to_gmem": "store",
    "swap": "write",
    "wait_smem_to_gmem": "wait for stores",
    "wgmma_accumulator_deref": "wait for product",
    "wgmma_ref": "product",
}


def events(jaxpr: Any) -> Iterator[str]:
    """Yield the accesses and synchronisations of a jaxpr in program order, loops in brackets."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        loop = name in ("while", "scan")
        if name in _WATCHED or loop:
            yield "[" if loop else _WATCHED[name]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from events(getattr(inner, "jaxpr", inner))
        if loop:
            yield "]"


def nth_call_dropped(monkeypatch, name: str, dropped: int) -> None:
    """Replace a function of Pallas by one that does nothing when called for that time."""
    real, calls = getattr(plgpu, name), iter(range(99))
    monkeypatch.setattr(plgpu, name, lambda *a: None if next(calls) == dropped else real(*a))
