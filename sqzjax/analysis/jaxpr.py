# SPDX-License-Identifier: Apache-2.0
"""Count the matrix operations of any JAX function by walking its jaxpr.

Unlike XLA's cost analysis, which counts the body of a loop once, a scan's body is multiplied by
its length. Use it as the fallback for functions without an analytical model and to check those
that have one. Tracing only: nothing is compiled or run. Of a Pallas kernel one program is counted.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable[..., Any], *args: Any, while_trips: int | None = None) -> int:
    """Return two operations per multiply-add of every product and convolution in `fn(*args)`.

    `args` may be `jax.ShapeDtypeStruct`s. A `cond` counts its costliest branch. The trip count of a
    `while` (or a `fori_loop` with traced bounds) is unknown: a function whose loop contains
    products needs `while_trips`, which is applied to every such loop.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, while_trips)


def _count(jaxpr: core.Jaxpr, while_trips: int | None) -> int:
    return sum(_equation(equation, while_trips) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn, while_trips: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, while_trips)
    if name == "cond":
        return max(_count(branch.jaxpr, while_trips) for branch in params["branches"])
    inner = sum(_count(jaxpr, while_trips) for jaxpr in _subjaxprs(params))
    if name != "while" or not inner:
        return inner
    if while_trips is None:
        raise ValueError(
            "while_trips=None, but a while loop contains products and its trip count is not "
            "known from the jaxpr; give while_trips or use a scan"
        )
    return while_trips * inner


def _subjaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the jaxprs held by call-like primitives, whatever their parameter is called."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # closed ones hold an open one
            if isinstance(jaxpr, core.Jaxpr):
                found.append(jaxpr)
    return found


def _dot(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
    """Every output element sums over a filter's window and input channels (of its own group)."""
    kernel = _shape(equation.invars[1])
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // out_channels


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
