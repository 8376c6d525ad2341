# SPDX-License-Identifier: Apache-2.0
"""What one forward pass of autoregressive and of diffusion decoding costs (arXiv 2510.04146).

Five regimes differ in how many tokens are fed and how many keys they see: autoregressive decoding
and prefill, a diffusion step over the whole sequence, and a diffusion step of one block with or
without an exact cache. Arithmetic on `sqzjax.analysis.operators`, no device needed; pick it to
choose block size and batch before running anything. Left out are what a fixed floor per step can
stand for (kernel launches, the host) and cache misses. `sqzjax.analysis.crossover` compares the
regimes over whole generations.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from sqzjax.analysis.devices import Hardware
from sqzjax.analysis.numbers import Number
from sqzjax.analysis.operators import Operator, operators
from sqzjax.analysis.profiling_model import published_operators
from sqzjax.analysis.roofline import Roofline, footprint, roofline
from sqzjax.analysis.workload import Precision, Workload
from sqzjax.models.config import ModelConfig

Regime = Literal["arm_prefill", "arm_decode", "full_dlm", "block_uncached", "block_cached"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
CACHED: tuple[Regime, ...] = ("arm_decode", "block_cached")
"""The regimes that read keys of earlier passes."""
DIFFUSION: tuple[Regime, ...] = ("full_dlm", "block_uncached", "block_cached")
_SAMPLING_OPERATIONS = 6  # softmax as in attention, and one comparison for the arg max


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is counted.

    `convention="published"` takes the operators of `profiling_model`. `head` says whose passes
    compute logits: every regime's, only the autoregressive ones (as published) or none; diffusion
    needs them for the tokens being generated alone. `sampling_bits` is the width in which the
    softmax over the vocabulary reads them, 0 leaves it out (as published). `floor_seconds` is added
    to every pass. `density` is the share of the cached tokens that sparse attention reads.
    `residual` adds the product of probabilities and embedding table of RCD (arXiv 2601.22954) to
    diffusion steps.
    """

    precision: Precision = Precision()
    convention: Literal["fused", "published"] = "fused"
    head: Literal["all", "arm", "none"] = "all"
    sampling_bits: Literal[0, 32, 64] = 32
    floor_seconds: Number = 0.0
    density: Number = 1.0
    residual: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.floor_seconds < float("inf"):
            raise ValueError(
                f"floor_seconds={self.floor_seconds} must be >= 0 and finite; 0 is no floor"
            )
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must lie in (0, 1]; 1 is dense attention")


PUBLISHED = StepOptions(convention="published", head="arm", sampling_bits=0)
"""The counting rules of the published figures."""


@dataclass(frozen=True)
class StepCost:
    """Cost of one forward pass of `batch` sequences, and what it means per token."""

    regime: Regime
    workload: Workload
    roofline: Roofline
    floor_seconds: Number

    @property
    def batch(self) -> int:
        """Sequences of the pass."""
        return self.workload.batch

    @property
    def fed(self) -> int:
        """Tokens fed per sequence."""
        return self.workload.queries

    @property
    def seconds(self) -> Number:
        """Least time of the pass and the floor."""
        return self.roofline.seconds + self.floor_seconds

    @property
    def flops(self) -> Number:
        """Matrix operations."""
        return self.roofline.flops

    @property
    def operations(self) -> Number:
        """Matrix and vector operations."""
        return self.roofline.operations

    @property
    def bytes(self) -> Number:
        """Memory traffic."""
        return self.roofline.bytes

    @property
    def stored_bytes(self) -> Number:
        """The part of the traffic that reads parameters and the cache."""
        ops = (row.operator for row in self.roofline.rows)
        return sum(op.count * (op.weight_bytes + op.kv_read) for op in ops)

    @property
    def intensity(self) -> Number:
        """Operations per byte."""
        return self.roofline.intensity

    @property
    def bound(self) -> str:
        """What the pass waits for most: compute, vector, memory, or the floor."""
        return "floor" if self.floor_seconds > self.roofline.seconds else self.roofline.bound

    def tokens_per_second(self, tokens: Number) -> Number:
        """Throughput of the batch when a pass yields `tokens` per sequence."""
        return self.batch * tokens / self.seconds


def regime(
    model: ModelConfig,
    name: Regime,
    *,
    context: int,
    new: int = 1,
    batch: int = 1,
    hardware: Hardware,
    options: StepOptions = StepOptions(),
) -> StepCost:
    """Return the cost of one forward pass.

    `context` are the tokens before those being generated, `new` the tokens generated together: a
    block, or the whole response of `full_dlm`; decoding has one and prefill none. A block without
    a cache feeds the context again and leaves out what follows the block; loops that feed the
    still masked rest as well cost what `full_dlm` does.
    """
    work = workload(name, context=context, new=new, batch=batch, options=options)
    ops = step_operators(model, name, work, options)
    return StepCost(name, work, roofline(ops, hardware), options.floor_seconds)


def workload(
    name: Regime, *, context: int, new: int, batch: int, options: StepOptions = StepOptions()
) -> Workload:
    """Return the shape of a pass: tokens fed, keys seen, rows of the head."""
    new = {"arm_decode": 1, "arm_prefill": 0}.get(name, new)
    least = {"context": int(name == "arm_prefill"), "new": int(name != "arm_prefill"), "batch": 1}
    for field, value in (("context", context), ("new", new), ("batch", batch)):
        if value < least[field]:
            raise ValueError(f"{field}={value} of regime {name!r} must be >= {least[field]}")
    past = round(options.density * context) if name in CACHED else context
    wanted = options.head == "all" or (options.head == "arm" and name not in DIFFUSION)
    return Workload(
        phase="decode" if name in CACHED else "prefill",
        batch=batch,
        context=past + new,
        query_tokens=new if name in CACHED else context + new,
        logit_rows=max(1, new) * wanted,
        causal=name == "arm_prefill",
        store_kv=name not in DIFFUSION,
    )


def step_operators(
    model: ModelConfig, name: Regime, work: Workload, options: StepOptions
) -> tuple[Operator, ...]:
    """List the operators of a pass with what follows the logits."""
    make = published_operators if options.convention == "published" else operators
    ops = [*make(model, options.precision, work)]
    rows = work.batch * work.head_rows
    if rows and options.sampling_bits:
        size = rows * model.embedding_size
        ops.append(
            Operator(
                name="sampling",
                vector_flops=_SAMPLING_OPERATIONS * size,
                activation_read=size * options.sampling_bits / 8,
            )
        )
    if rows and options.residual and name in DIFFUSION:
        ops.append(_residual(model, options.precision, rows))
    return tuple(ops)


def _residual(model: ModelConfig, precision: Precision, rows: int) -> Operator:
    """Product of the rows' probabilities with the embedding table."""
    vocabulary, width = model.embedding_size, model.hidden_size
    return Operator(
        name="residual",
        flops=2 * rows * vocabulary * width,
        weight_bytes=vocabulary * width * precision.other_bits / 8,
        activation_read=rows * vocabulary * precision.activation_bits / 8,
        activation_write=rows * width * precision.activation_bits / 8,
    )


def without_logits(options: StepOptions) -> StepOptions:
    """Return options of a pass that only fills the cache."""
    return dataclasses.replace(options, head="none")


def memory_bytes(model: ModelConfig, precision: Precision, cost: StepCost, context: int) -> Number:
    """Bytes that a device must hold: parameters, live activations and, with a cache, `context`."""
    held = footprint(model, precision, cost.workload, capacity=context + cost.fed)
    return held.total if cost.workload.store_kv or cost.regime in CACHED else held.total - held.kv


def ridge(hardware: Hardware, precision: Precision) -> Number:
    """Operations per byte at which these number formats become bound by compute."""
    peak = (precision.low_precision and hardware.peak_int8) or hardware.peak_flops
    return peak / hardware.bandwidth
