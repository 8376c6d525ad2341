# SPDX-License-Identifier: Apache-2.0
"""What the kernels of other libraries share: their common limits, and a complete backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.attention.xla import (
    Scoring,
    default_config,
    flash_backward,
    visibility,
)
from pallas_kernels.common import current_target


def check_problem(name: str, problem: Any) -> None:
    """Raise NotImplementedError for what no library kernel can do."""
    if not problem.in_order:
        raise NotImplementedError(f"{name}: goes by index; leave the positions at their default")
    if not (problem.mask.window is None or isinstance(problem.mask.window, int)):
        raise NotImplementedError(f"{name}: the window must be static")


def with_backward(run: Callable, q, k, v, segments, problem) -> tuple[Array, Array]:
    """Return `run(q, k, v, segments, differentiable)`, (out, log-sum-exp), with both cotangents.

    Libraries differentiate the output alone, which is all that a `differentiable` run must do.
    Where the log-sum-exp is used too, the backward pass is XLA's, from the saved results.
    """
    return _attend(run, problem, q, k, v, segments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(run, problem, q, k, v, segments):
    return run(q, k, v, segments, False)


def _forward(run, problem, q, k, v, segments):
    del problem
    q, k, v = (x.value for x in (q, k, v))
    segments = jax.tree.map(lambda x: x.value, segments, is_leaf=lambda x: hasattr(x, "perturbed"))
    (out, lse), pullback = jax.vjp(lambda q, k, v: run(q, k, v, segments, True), q, k, v)
    # The output was made in q's dtype: nothing is lost, and half the memory not kept twice.
    return (out, lse), (pullback, q, k, v, segments, out.astype(q.dtype), lse)


def _backward(run, problem, saved, cotangents):
    del run
    pullback, q, k, v, segments, out, lse = saved
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(out.shape, jnp.float32)
    if isinstance(d_lse, SymbolicZero):
        grads = pullback((d_out, jnp.zeros(lse.shape, jnp.float32)))
    else:
        lengths = (q.shape[1], k.shape[2])
        visible = visibility(problem.mask, None, None, segments, lengths)
        scoring = Scoring(problem.scale, problem.softcap)
        config = default_config(q, k, problem.mask, current_target())
        cotangents = (d_out, d_lse)
        grads = flash_backward(q, k, v, visible, out, lse, cotangents, scoring, config)
    return (*grads, jax.tree.map(lambda _: None, segments))


_attend.defvjp(_forward, _backward, symbolic_zeros=True)
