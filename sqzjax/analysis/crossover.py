# SPDX-License-Identifier: Apache-2.0
"""When diffusion decoding beats autoregressive decoding: whole generations, break-even, batches.

A diffusion step costs more than an autoregressive one and yields several tokens, so it wins while
tokens per forward pass exceed the ratio of step times. That ratio grows with the batch, because
autoregressive decoding is the one with idle compute left; the crossing batch is where it overtakes.
Built on `sqzjax.analysis.regimes`; tokens per step are an assumption of the caller.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sqzjax.analysis.devices import Hardware
from sqzjax.analysis.numbers import Number
from sqzjax.analysis.regimes import (
    DIFFUSION,
    Regime,
    StepCost,
    StepOptions,
    memory_bytes,
    regime,
    ridge,
    without_logits,
)
from sqzjax.models.config import ModelConfig

_LINEAR = 1e-9


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Whole generation of a batch: passes, time, operations and traffic, prefill included."""

    passes: int
    seconds: float
    prefill_seconds: float
    operations: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes


def passes_per_block(name: Regime, new: int, tokens_per_step: Number) -> int:
    """Forward passes that complete `new` tokens; a cache needs one more to store the block."""
    if name not in DIFFUSION:
        return new
    if not 0 < tokens_per_step <= new:
        raise ValueError(
            f"tokens_per_step={tokens_per_step} must lie in (0, {new}], the tokens of a block"
        )
    return math.ceil(new / tokens_per_step) + (name == "block_cached")


def tokens_per_pass(name: Regime, new: int, tokens_per_step: Number) -> float:
    """Tokens of one sequence that a forward pass completes on average."""
    return new / passes_per_block(name, new, tokens_per_step)


def generation(
    model: ModelConfig,
    name: Regime,
    *,
    prompt: int,
    length: int,
    block: int = 1,
    batch: int = 1,
    tokens_per_step: Number = 1,
    hardware: Hardware,
    options: StepOptions = StepOptions(),
) -> Generation:
    """Return the cost of generating `length` tokens after a prompt.

    Autoregressive: a prefill, which yields the first token, and a pass for each other one. Cached
    blocks: a prefill, the steps of each block and a pass that stores it. The other two have no
    prefill; every step pays for the prompt.
    """
    if name == "arm_prefill":
        raise ValueError("regime 'arm_prefill' generates nothing; use 'arm_decode'")
    if length < 1 or (name.startswith("block") and (block < 1 or length % block)):
        raise ValueError(f"length={length} must be a positive multiple of block={block}")

    def cost(name: Regime, context: int, new: int, options: StepOptions) -> np.ndarray:
        step = regime(
            model,
            name,
            context=context,
            new=new,
            batch=batch,
            hardware=hardware,
            options=options,
        )
        return np.array([1, step.seconds, step.operations, step.bytes], float)

    fill = without_logits(options)
    total, prefill = np.zeros(4), np.zeros(4)
    if name == "full_dlm":
        total += passes_per_block(name, length, tokens_per_step) * cost(
            name, prompt, length, options
        )
    elif name == "arm_decode":
        prefill = cost("arm_prefill", prompt, 0, options)
        total += _sum(lambda done: cost(name, prompt + done, 1, options), length - 1)
    else:
        cached = name == "block_cached"
        if cached and prompt:
            prefill = cost("arm_prefill", prompt, 0, fill)
        steps = passes_per_block(name, block, tokens_per_step) - cached

        def one_block(index: int) -> np.ndarray:
            context = prompt + index * block
            stored = cost(name, context, block, fill) if cached else 0
            return steps * cost(name, context, block, options) + stored

        total += _sum(one_block, length // block)
    passes, seconds, operations, moved = (prefill + total).tolist()
    return Generation(
        passes=round(passes),
        seconds=seconds,
        prefill_seconds=float(prefill[1]),
        operations=operations,
        bytes=moved,
    )


def _sum(cost: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Sum `cost` over 0..count - 1, interpolating where it is linear: everywhere but at bends.

    Convex costs are linear where the middle lies on the chord. With sparse attention, which reads
    whole keys, the sum is off by less than one key per pass.
    """

    def between(first: int, last: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Sum without the two ends."""
        if last - first < 2:
            return np.zeros_like(low)
        middle = (first + last) // 2
        value = cost(middle)
        share = (middle - first) / (last - first)
        if np.allclose(value, low + share * (high - low), rtol=_LINEAR, atol=0):
            return (last - first - 1) * (low + high) / 2
        left = between(first, middle, low, value)
        return left + value + between(middle, last, value, high)

    if count < 2:
        return cost(0) if count else np.zeros(4)
    low, high = cost(0), cost(count - 1)
    return low + high + between(0, count - 1, low, high)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A diffusion regime against autoregressive decoding at the same context."""

    arm: ModelConfig
    dlm: ModelConfig
    name: Regime
    context: int
    new: int
    hardware: Hardware
    options: StepOptions = StepOptions()

    def ratio(self, batch: int) -> Number:
        """Time of a diffusion pass over that of an autoregressive one.

        It is the break-even: the tokens per forward pass at which both are equally fast.
        """
        return self._cost(self.dlm, self.name, batch).seconds / self.arm_seconds(batch)

    def arm_seconds(self, batch: int) -> Number:
        """Time of an autoregressive pass."""
        return self._cost(self.arm, "arm_decode", batch).seconds

    def tokens_per_step(self, batch: int) -> Number | None:
        """Tokens per denoising step at the break-even; None where even a whole block is too few.

        The pass that stores a finished block yields nothing, so a cached block needs more than the
        ratio of times.
        """
        ratio = self.ratio(batch)
        if self.name != "block_cached":
            return ratio if ratio <= self.new else None
        needed = ratio / (1 - ratio / self.new) if ratio < self.new else math.inf
        return needed if needed <= self.new else None

    def crossing_batch(self, tokens_per_step: Number, largest: int) -> int | None:
        """Smallest batch at which autoregressive decoding is faster, None up to `largest`.

        Searched at powers of two and bisected below the first that qualifies.
        """
        yielded = tokens_per_pass(self.name, self.new, tokens_per_step)
        low, high = 0, 1
        while self.ratio(high) <= yielded:
            if high == largest:
                return None
            low, high = high, min(2 * high, largest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.ratio(middle) <= yielded else (low, middle)
        return high

    def _cost(self, model: ModelConfig, name: Regime, batch: int) -> StepCost:
        return regime(
            model,
            name,
            context=self.context,
            new=self.new,
            batch=batch,
            hardware=self.hardware,
            options=self.options,
        )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A block size and batch, the intensity of its step, and whether it fits in memory."""

    block: int
    batch: int
    intensity: Number
    seconds: Number
    fits: bool


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What block size and batch bring a cached block step near the ridge.

    `nearest` is the pair closest to it (by ratio) of those that fit; of pairs equally close the
    one with fewer rows. `reaching` holds, for each block size, the smallest batch at or above the
    ridge, None where memory or the context keeps every batch below.
    """

    ridge: Number
    nearest: Planned | None
    reaching: dict[int, Planned | None]


def plan_batches(
    model: ModelConfig,
    hardware: Hardware,
    *,
    context: int,
    blocks: Sequence[int],
    batches: Sequence[int],
    options: StepOptions = StepOptions(),
) -> BatchPlan:
    """Choose block size and batch of a cached block step so that neither side idles."""
    target = ridge(hardware, options.precision)
    pairs = [
        _planned(model, hardware, context, block, batch, options)
        for block in sorted(blocks)
        for batch in sorted(batches)
    ]
    fitting = [pair for pair in pairs if pair.fits]

    def distance(pair: Planned) -> tuple[float, int]:
        # Rounded, so that pairs equal up to rounding are decided by their rows.
        return round(abs(math.log(pair.intensity / target)), 6), pair.block * pair.batch

    reaching = {
        block: next((p for p in fitting if p.block == block and p.intensity >= target), None)
        for block in sorted(blocks)
    }
    return BatchPlan(
        ridge=target, nearest=min(fitting, key=distance, default=None), reaching=reaching
    )


def _planned(
    model: ModelConfig,
    hardware: Hardware,
    context: int,
    block: int,
    batch: int,
    options: StepOptions,
) -> Planned:
    cost = regime(
        model,
        "block_cached",
        context=context,
        new=block,
        batch=batch,
        hardware=hardware,
        options=options,
    )
    held = memory_bytes(model, options.precision, cost, context)
    return Planned(
        block=block,
        batch=batch,
        intensity=cost.intensity,
        seconds=cost.seconds,
        fits=not hardware.memory_bytes or held <= hardware.memory_bytes,
    )
