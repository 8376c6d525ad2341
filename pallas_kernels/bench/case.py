# SPDX-License-Identifier: Apache-2.0
"""What is measured: an operation at a shape, by several candidates."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels

MIB = 1 << 20


@dataclass(frozen=True)
class Foreign:
    """A candidate that is no jax function: `fn` is called with `convert(inputs)` as arguments.

    `fn` may return before its work is done; `wait()` returns after all of it is.
    """

    fn: Callable[..., Any]
    convert: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    wait: Callable[[], None]


Candidate = Callable[..., Any] | Foreign


@dataclass(frozen=True)
class BenchCase:
    """An operation at one shape.

    `make_inputs(seed)` returns the positional arguments, arrays on the default device; it is called
    with several seeds, and one call uses one of these sets. `candidates` compute the same result
    from them; jax functions are jitted here. The first is the one to judge and the others are its
    baselines; None stands for one that is not installed. `bytes_moved` is what a call must read
    and write at least, the same for all candidates.
    """

    op: str
    shape_name: str
    make_inputs: Callable[[int], tuple[Any, ...]]
    candidates: Mapping[str, Candidate | None]
    bytes_moved: int

    @property
    def name(self) -> str:
        """Operation and shape, by which results are kept."""
        return f"{self.op}/{self.shape_name}"


def torch_candidate(fn: Callable[..., Any]) -> Foreign | None:
    """Return a candidate in PyTorch on the same memory and device; None without PyTorch.

    `fn` gets tensors in place of jax's arrays; PyTorch is imported when it is measured.
    """
    if importlib.util.find_spec("torch") is None:
        return None

    def convert(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return jax.tree.map(importlib.import_module("torch").from_dlpack, inputs)

    def wait() -> None:
        cuda = importlib.import_module("torch").cuda
        if cuda.is_available():
            cuda.synchronize()

    return Foreign(fn, convert, wait)


def copy_case(size: int | None = None) -> BenchCase:
    """Return the reference of all others: read `size` bytes (by default 256 MiB), write as many."""
    size = size or 256 * MIB

    def make_inputs(seed: int) -> tuple[jax.Array]:
        return (jnp.full((size // 4,), seed, jnp.float32),)

    add: Candidate = _in_place_add() if jax.default_backend() == "cpu" else lambda x: x + 1
    return BenchCase("copy", f"{size / MIB:g}MiB", make_inputs, {"xla": add}, 2 * size)


def _in_place_add() -> Foreign:
    """Return an addition to the inputs themselves: on a CPU new results would be new pages."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def fn(held: list[jax.Array]) -> None:
        held[0] = add(held[0]).block_until_ready()

    return Foreign(fn, convert=lambda inputs: (list(inputs),), wait=lambda: None)


def all_cases() -> list[BenchCase]:
    """Return the cases of every operation; the copy is none of them."""
    found: list[BenchCase] = []
    for package in pkgutil.iter_modules(pallas_kernels.__path__):
        name = f"pallas_kernels.{package.name}.bench"
        if package.ispkg and importlib.util.find_spec(name):
            found += importlib.import_module(name).cases()
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"benchmark cases {twice} are registered twice; rename the shapes")
    return found
