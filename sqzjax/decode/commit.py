# SPDX-License-Identifier: Apache-2.0
"""Which masked positions of a block a denoising step fills: commit policies.

A policy sees, per position of the block, the score of its predicted token and whether it is still
masked, and marks positions; it is a pure function, row by row. One that `remasks` may take tokens
of the block back, fewer than it fills in the same step: a row that has masked positions always
ends the step with fewer of them. Other policies never change a committed token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.typing import Array, Bool, Float, Int

Score = Literal["confidence", "margin", "entropy", "random"]


class Candidates(NamedTuple):
    """Predictions for the positions of each row's block.

    `score` is larger where the model is surer and is what positions are ranked by; `confidence`
    is the probability of the predicted token and `entropy` that of its distribution (nats).
    """

    score: Array  # B n float32
    confidence: Array  # B n float32
    entropy: Array  # B n float32
    masked: Array  # B n bool
    step: Array  # B int32: denoising steps already done in this block
    size: Array  # B int32: positions of the block that were masked when it was opened
    held: Array | None = None  # B n float32: probability of the token there, or infinity where it
    # cannot be taken back; only for policies that remask
    noise: Array | None = None  # B n float32 in [0, 1); only for policies that draw


def ranks(score: Float[Array, "B n"], masked: Bool[Array, "B n"]) -> Int[Array, "B n"]:
    """Return each masked position's place in descending order of score, ties to the left."""
    above = score[:, None, :] > score[:, :, None]
    index = jnp.arange(score.shape[1])
    tied = (score[:, None, :] == score[:, :, None]) & (index[None, :] < index[:, None])
    return jnp.sum((above | tied) & masked[:, None, :], axis=-1).astype(jnp.int32)


class CommitPolicy(ABC):
    """A rule for filling positions; a frozen dataclass."""

    score: Score = "confidence"
    tempered: bool = False
    """Whether certainty is that of the distribution tokens are drawn from, not the raw one."""

    @property
    def remasks(self) -> bool:
        """Whether the policy takes tokens back, for which it needs what they are held for."""
        return False

    @property
    def draws(self) -> bool:
        """Whether chance picks positions, for which the policy needs noise."""
        return False

    @abstractmethod
    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        """Return the positions to fill; those not masked, and too few of them, are seen to."""

    def order(self, candidates: Candidates) -> Float[Array, "B n"]:
        """Return what positions are ranked by, the best the largest."""
        return candidates.score

    def reopens(self, candidates: Candidates) -> Bool[Array, "B n"]:
        """Return the tokens to mask again; fewer than there are masked positions."""
        return jnp.zeros_like(candidates.masked)

    def commit(self, candidates: Candidates) -> Bool[Array, "B n"]:
        """Return the masked positions to fill: what `marks` says, and always the best.

        Where tokens are masked again, that is as many of the best and one more.
        """
        least = jnp.sum(self.reopens(candidates), axis=1, keepdims=True)
        best = ranks(self.order(candidates), candidates.masked) <= least
        return candidates.masked & (self.marks(candidates) | best)


def _quota(candidates: Candidates, steps: int) -> Array:
    """Positions due in this step if a block takes `steps` of them, the early ones taking more."""
    base, extra = candidates.size // steps, candidates.size % steps
    return base + (candidates.step < extra)


def _falling(steps: int, eps: float, step: Int[Array, "B"]) -> Float[Array, "B"]:
    """Return the share of the masked positions due in a step, in the float32 of Dream's code."""
    time = np.linspace(1, eps, steps + 1, dtype=np.float32)
    share = (1 - time[1:] / time[:-1]).astype(np.float32)
    share[-1] = 1
    return jnp.asarray(share)[jnp.clip(step, 0, steps - 1)]


def _check(name: str, value: float | int, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"{name}={value} {rule}")


@dataclass(frozen=True, kw_only=True)
class TopCount(CommitPolicy):
    """Fill a fixed number per step, the surest first: `steps` denoising steps a block.

    LLaDA's low-confidence remasking (arXiv 2502.09992) and SDAR's static rule; with `score`
    "random", their random one. `steps` 0 fills one position per step. "margin" and "entropy" are
    Dream's orders (arXiv 2508.15487); its code has them `tempered`, that is after temperature and
    filters, and `temperature` is its `alg_temp`: positions are drawn, without replacement, with
    probabilities softmax(score / temperature).
    `schedule` "even" gives each step as many positions, early ones the odd ones; "dream" is that
    of Dream's code: of the positions still masked the share by which the time falls, from 1 to
    `eps` in equal steps, rounded down, so that a step may fill none and the last fills the rest.
    """

    kind: Literal["top_count"] = "top_count"
    steps: int = 0
    score: Score = "confidence"
    schedule: Literal["even", "dream"] = "even"
    eps: float = 1e-3
    temperature: float = 0.0
    tempered: bool = False

    def __post_init__(self) -> None:
        _check("steps", self.steps, self.steps >= 0, "must be >= 0 (0: one position per step)")
        dream = self.schedule == "dream"
        _check("steps", self.steps, self.steps > 0 or not dream, "must be > 0 (Dream's)")
        _check("eps", self.eps, 0 < self.eps < 1, "must lie in (0, 1); 1e-3 is Dream's")
        heat, rule = self.temperature, "must be 0 (the surest first) or in [1e-6, 1e6]"
        _check("temperature", heat, heat == 0 or 1e-6 <= heat <= 1e6, rule)

    @property
    def draws(self) -> bool:
        return self.score == "random" or self.temperature > 0

    def order(self, candidates: Candidates) -> Float[Array, "B n"]:
        if not self.draws:
            return candidates.score
        assert candidates.noise is not None
        # The largest sums with Gumbel noise are a draw without replacement from the softmax.
        gumbel = -jnp.log(-jnp.log(candidates.noise))
        return candidates.score / (self.temperature or 1.0) + gumbel

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        if not self.steps:
            return jnp.zeros_like(candidates.masked)
        place = ranks(self.order(candidates), candidates.masked)
        if self.schedule == "dream":
            masked = jnp.sum(candidates.masked, axis=1).astype(jnp.float32)
            due = jnp.floor(masked * _falling(self.steps, self.eps, candidates.step))
            return place < due[:, None]
        return place < _quota(candidates, self.steps)[:, None]

    def commit(self, candidates: Candidates) -> Bool[Array, "B n"]:
        if self.schedule == "dream":
            return candidates.masked & self.marks(candidates)
        return super().commit(candidates)


@dataclass(frozen=True, kw_only=True)
class Ancestral(CommitPolicy):
    """Fill every masked position with the chance by which the time falls in this step.

    The reverse process of masked diffusion itself, in `steps` steps a block, whatever the model is
    sure of; Dream's `alg="origin"`. The time falls from 1 to `eps` in equal steps; a step may
    fill none, the last fills the rest.
    """

    kind: Literal["ancestral"] = "ancestral"
    steps: int = 128
    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check("steps", self.steps, self.steps > 0, "must be > 0")
        _check("eps", self.eps, 0 < self.eps < 1, "must lie in (0, 1); 1e-3 is Dream's")

    @property
    def draws(self) -> bool:
        return True

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        assert candidates.noise is not None
        return candidates.noise < _falling(self.steps, self.eps, candidates.step)[:, None]

    def commit(self, candidates: Candidates) -> Bool[Array, "B n"]:
        return candidates.masked & self.marks(candidates)


@dataclass(frozen=True, kw_only=True)
class Threshold(CommitPolicy):
    """Fill every position whose confidence reaches `threshold` (Fast-dLLM, arXiv 2505.22618).

    `decay` lowers it from 1 by that much per step of the block down to `threshold` (dInfer, arXiv
    2510.08666, section on smoothing). `steps` > 0 fills at least the static quota, SDAR's dynamic
    rule (its test is strict; the difference needs a confidence equal to the threshold).
    """

    kind: Literal["threshold"] = "threshold"
    threshold: float = 0.9
    decay: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        _check("threshold", self.threshold, self.threshold >= 0, "must be >= 0 (> 1: one a step)")
        _check("decay", self.decay, self.decay >= 0, "must be >= 0")
        _check("steps", self.steps, self.steps >= 0, "must be >= 0")

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        level = jnp.full_like(candidates.confidence[:, :1], self.threshold)
        if self.decay:
            falling = 1.0 - self.decay * candidates.step[:, None].astype(jnp.float32)
            level = jnp.maximum(level, falling)
        chosen = candidates.confidence >= level
        if not self.steps:
            return chosen
        place = ranks(candidates.score, candidates.masked)
        return chosen | (place < _quota(candidates, self.steps)[:, None])


@dataclass(frozen=True, kw_only=True)
class Factor(CommitPolicy):
    """Fill the largest n surest positions with (n + 1)(1 - confidence) <= `factor`.

    Fast-dLLM's rule from its theorem 1: up to there greedy decoding of the marginals equals greedy
    decoding of the joint distribution if `factor` <= 1.
    """

    kind: Literal["factor"] = "factor"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _check("factor", self.factor, self.factor >= 0, "must be >= 0")

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        count = ranks(candidates.confidence, candidates.masked) + 1
        holds = (count + 1) * (1.0 - candidates.confidence) <= self.factor
        reach = jnp.max(jnp.where(holds & candidates.masked, count, 0), axis=1, keepdims=True)
        return count <= reach


@dataclass(frozen=True, kw_only=True)
class LocalLeap(CommitPolicy):
    """Relax the threshold within `radius` positions of a sure one (arXiv 2510.07081).

    Anchors are masked positions with confidence >= `threshold`; committed tokens are none.
    """

    kind: Literal["local_leap"] = "local_leap"
    threshold: float = 0.9
    relaxed: float = 0.75
    radius: int = 4

    def __post_init__(self) -> None:
        rule = f"must be between 0 and threshold={self.threshold}"
        _check("relaxed", self.relaxed, 0 <= self.relaxed <= self.threshold, rule)
        _check("radius", self.radius, self.radius >= 0, "must be >= 0")

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        anchors = candidates.masked & (candidates.confidence >= self.threshold)
        width = 2 * self.radius + 1
        near = jax.lax.reduce_window(
            anchors.astype(jnp.int32), 0, jax.lax.max, (1, width), (1, 1), "SAME"
        )
        level = jnp.where(near > 0, self.relaxed, self.threshold)
        return candidates.confidence >= level


@dataclass(frozen=True, kw_only=True)
class EntropyBounded(CommitPolicy):
    """Fill positions in ascending order of entropy while their sum stays under `bound` nats.

    SDAR's `entropy_bounded` rule, re-derived: its published code works on a scalar.
    """

    kind: Literal["entropy_bounded"] = "entropy_bounded"
    bound: float = 0.35

    def __post_init__(self) -> None:
        _check("bound", self.bound, self.bound >= 0, "must be >= 0")

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        place = ranks(-candidates.entropy, candidates.masked)
        earlier = (place[:, None, :] <= place[:, :, None]) & candidates.masked[:, None, :]
        running = jnp.sum(jnp.where(earlier, candidates.entropy[:, None, :], 0.0), axis=-1)
        return running < self.bound


@dataclass(frozen=True, kw_only=True)
class Hierarchical(CommitPolicy):
    """Fill the surest position of every masked run above `low`, and all above `threshold`.

    dInfer's hierarchical decoder (arXiv 2510.08666): runs keep splitting, so that a block takes
    about the logarithm of its size in steps where the model is sure. Tokens of the block whose
    probability has fallen below `remask` are masked again (its variant has 0.4; 0: never), the
    least probable first if there are too many.
    """

    kind: Literal["hierarchical"] = "hierarchical"
    threshold: float = 0.9
    low: float = 0.4
    remask: float = 0.0

    def __post_init__(self) -> None:
        rule = f"must be between 0 and threshold={self.threshold}"
        _check("low", self.low, 0 <= self.low <= self.threshold, rule)
        _check("remask", self.remask, 0 <= self.remask <= self.threshold, rule)

    @property
    def remasks(self) -> bool:
        return self.remask > 0

    def reopens(self, candidates: Candidates) -> Bool[Array, "B n"]:
        if candidates.held is None:
            return super().reopens(candidates)
        doubtful = candidates.held < self.remask
        room = jnp.sum(candidates.masked, axis=1, keepdims=True) - 1
        return doubtful & (ranks(-candidates.held, doubtful) < room)

    def marks(self, candidates: Candidates) -> Bool[Array, "B n"]:
        masked, confidence = candidates.masked, candidates.confidence
        first = masked & ~jnp.pad(masked, ((0, 0), (1, 0)))[:, :-1]
        run = jnp.cumsum(first, axis=1)
        rival = (run[:, None, :] == run[:, :, None]) & masked[:, None, :]
        index = jnp.arange(masked.shape[1])
        left = index[None, :] < index[:, None]
        beats = confidence[:, None, :] > confidence[:, :, None]
        beats |= (confidence[:, None, :] == confidence[:, :, None]) & left
        best = ~jnp.any(rival & beats, axis=-1)
        return (best & (confidence > self.low)) | (confidence > self.threshold)


CommitConfig = TopCount | Ancestral | Threshold | Factor | LocalLeap | EntropyBounded | Hierarchical
