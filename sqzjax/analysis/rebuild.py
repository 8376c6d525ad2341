# SPDX-License-Identifier: Apache-2.0
"""Whether to store keys and values, the layer's input, or latents of it: a matter of shapes.

The cost table of XQuant (arXiv 2508.10395, section 3.4): making K and V again costs arithmetic and
saves bytes, and is free while a step waits for its weights and its cache anyway. Formulas are those
of the paper: K and V of all tokens are both rebuilt (this library mixes inputs or latents instead
of rebuilding V, which halves the operations), scales are not counted, a multiply-add is two
operations. P, the machine balance, is peak operations per second over bytes per second.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sqzjax.analysis.numbers import Number

Form = Literal["kv", "latent", "input", "cl"]

SIMILAR_BITS: dict[Form, int] = {"kv": 3, "latent": 3, "input": 4, "cl": 2}
"""Bits at which the forms lose about as much perplexity (Table 4): 0.1 on Llama-2-7B."""


@dataclass(frozen=True, kw_only=True)
class RebuildCost:
    """What one layer costs in one step of a batch.

    `stored` are the bytes that stay between steps, with the layer's share of the accumulator of
    XQuant-CL; `moved` those read, `weights` included; `operations` rebuild keys and values.
    """

    form: Form
    operations: Number
    stored: Number
    moved: Number

    def time(self, balance: Number) -> float:
        """Return the step's time in bytes: of traffic, or of arithmetic where that is longer."""
        return max(self.moved, self.operations / balance)


def weight_bytes(form: Form, d: int, d_kv: int) -> int:
    """Bytes of a layer's 16-bit weights as the paper counts them: of Llama-2 and Llama-3 blocks."""
    return 24 * d**2 if d_kv == d else 26 * d**2 + 4 * d_kv**2 * (form == "latent")


def rebuild_cost(
    form: Form,
    *,
    d: int,
    d_kv: int,
    length: int,
    batch: int = 1,
    bits: Number = 2,
    accumulator_bits: Number = 4,
    num_layers: int = 32,
    weights: int | None = None,
) -> RebuildCost:
    """Return the cost of `length` tokens in `batch` sequences; weights are read once for all."""
    tokens = length * batch
    pair = 2 * (bits / 8) * tokens * d_kv
    single = (bits / 8) * tokens * d
    accumulator = (accumulator_bits / 8) * tokens * d
    narrow = d_kv < d
    operations, cache = {
        "kv": (0, pair),
        "latent": (4 * tokens * d_kv**2, pair),
        "input": (4 * tokens * d * d_kv, single),
        "cl": (
            8 * tokens * d_kv * d if narrow else 4 * tokens * d**2 + 2 * tokens * d,
            pair if narrow else single,
        ),
    }[form]
    extra = accumulator if form == "cl" else 0
    weights = weight_bytes(form, d, d_kv) if weights is None else weights
    return RebuildCost(
        form=form,
        operations=operations,
        stored=cache + extra / num_layers,
        moved=cache + extra + weights,
    )


def choose_form(
    *,
    d: int,
    d_kv: int,
    length: int,
    balance: Number,
    batch: int = 1,
    slowdown: Number = 1,
    bits: Mapping[Form, Number] | None = None,
    num_layers: int = 32,
) -> RebuildCost:
    """Return the form that stores least among those that are fast enough.

    Fast enough: a step takes at most `slowdown` times as long as with quantized keys and values.
    `bits` of each form default to those of similar quality; name fewer forms to exclude some. Of
    forms that store equally much the faster one is taken.
    """
    if min(d, d_kv, length, batch) < 1 or balance <= 0 or slowdown < 1:
        raise ValueError(
            f"d={d}, d_kv={d_kv}, length={length}, batch={batch} must be >= 1, balance={balance} "
            f"> 0 and slowdown={slowdown} >= 1"
        )
    chosen: dict[Form, Number] = {"kv": SIMILAR_BITS["kv"]}
    chosen.update(SIMILAR_BITS if bits is None else bits)

    def cost(form: Form) -> RebuildCost:
        return rebuild_cost(
            form,
            d=d,
            d_kv=d_kv,
            length=length,
            batch=batch,
            bits=chosen[form],
            num_layers=num_layers,
        )

    allowed = slowdown * cost("kv").time(balance)
    costs = [made for form in chosen if (made := cost(form)).time(balance) <= allowed]
    return min(costs, key=lambda made: (made.stored, made.time(balance)))


def hidden_length(
    *, d: int, d_kv: int, bits: Number, balance: Number, counted: Literal["once", "twice"] = "twice"
) -> float:
    """Return the longest context, batch 1, whose rebuilding hides behind memory traffic.

    Inputs where `d_kv == d`, else latents, whose cache the paper's formula counts `counted`
    "once" although there are two of them. Infinite where traffic grows faster than arithmetic.
    """
    if d_kv == d:
        operations, traffic, weights = 4 * d**2, bits / 8 * d, weight_bytes("input", d, d_kv)
    else:
        operations, weights = 4 * d_kv**2, weight_bytes("latent", d, d_kv)
        traffic = (1 if counted == "once" else 2) * bits / 8 * d_kv
    spare = operations - balance * traffic
    return balance * weights / spare if spare > 0 else math.inf
