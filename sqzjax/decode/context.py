# SPDX-License-Identifier: Apache-2.0
"""What a masked position carries from one denoising step to the next, beside being masked.

Ordinary decoding forgets the distribution of every position that it does not fill (`NoContext`).
A context feeds part of it back through the position's embedding (`Residual`, `Smoothing`) or its
logits (`Credit`). States belong to the positions of the current block and are reset when a block
opens. To add one, write a class and extend the union.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sqzjax import residual
from sqzjax.models import DecoderLM
from sqzjax.residual_config import ResidualSettings
from sqzjax.typing import Array, Float, Int, Params, PyTree


class Context:
    """A policy: a frozen dataclass; the default of every method is to carry nothing."""

    @property
    def warmup(self) -> int:
        """Steps of a block that only gather context and fill nothing."""
        return 0

    def init(self, model: DecoderLM, params: Params, rows: int, width: int) -> PyTree:
        """Return the state of freshly opened blocks; leaves have the batch on axis 0."""
        del model, params, rows, width
        return None

    def embed(self, mask: Float[Array, "D"], state: PyTree) -> Float[Array, "B n D"] | None:
        """Return the embeddings of masked positions of the block; None: that of the mask."""
        del mask, state
        return None

    def adjust(self, logits: Float[Array, "B n V"], masked: Array, state: PyTree) -> Any:
        """Return the logits to decide by, and the state."""
        del masked
        return logits, state

    def update(
        self,
        model: DecoderLM,
        params: Params,
        logits: Float[Array, "B n V"],
        step: Int[Array, "B"],
        state: PyTree,
    ) -> PyTree:
        """Return the state for the next step; `step` counts those done before this one."""
        del model, params, logits, step
        return state


@dataclass(frozen=True, kw_only=True)
class NoContext(Context):
    """Masked positions are all alike."""

    kind: Literal["none"] = "none"


InitFrom = Literal["zero", "self", "dirichlet", "reference"]


@dataclass(frozen=True, kw_only=True)
class Residual(Context):
    """Mix each masked position's expected embedding into that of the mask, by its entropy: Residual
    Context Diffusion (arXiv 2601.22954, algorithm 2). Needs a model trained for it.

    `init_from`: what the first step of a block sees. "zero" nothing, as plain decoding; "self" the
    residual of a pass of its own, which fills nothing; "reference" that of the decoder's reference
    model; "dirichlet" the expected embedding under one random distribution per position
    (concentration 1, drawn with `seed`). Costs one product of the block with the embedding table
    per step.
    """

    kind: Literal["residual"] = "residual"
    settings: ResidualSettings = field(default_factory=ResidualSettings)
    init_from: InitFrom = "zero"
    seed: int = 0

    @property
    def warmup(self) -> int:
        return int(self.init_from == "self")

    def init(self, model, params, rows, width):
        config = model.config
        zeros = jnp.zeros((rows, width, config.hidden_size), jnp.float32)
        if self.init_from != "dirichlet":
            return {"alpha": jnp.zeros((rows, width), jnp.float32), "delta": zeros}
        # Logarithms of exponential variables are the logits of a uniform Dirichlet draw.
        key = jax.random.key(self.seed)
        draw = jax.random.exponential(key, (width, config.embedding_size))
        state = self._residual(model, params, jnp.log(draw)[None])
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *leaf.shape[1:])), state)

    def embed(self, mask, state):
        alpha = state["alpha"][..., None]
        return (1.0 - alpha) * mask.astype(jnp.float32) + alpha * state["delta"]

    def update(self, model, params, logits, step, state):
        del step, state
        return self._residual(model, params, logits)

    def _residual(self, model: DecoderLM, params: Params, logits: Array):
        config = model.config
        rows = logits.reshape(-1, logits.shape[-1])
        table = params["embed"]["embedding"]
        ids = {"mask_id": config.tokens.mask, "vocab_size": config.vocab_size}
        alpha, delta = residual.from_logits(rows, table, self.settings, **ids)
        shape = logits.shape[:-1]
        return {"alpha": alpha.reshape(shape), "delta": delta.reshape(*shape, -1)}


@dataclass(frozen=True, kw_only=True)
class Smoothing(Context):
    """Mix each masked position's expected embedding into that of the mask with a growing weight:
    iteration smoothing of dInfer (arXiv 2510.08666), which needs no training.

    The weight is `first` after the first step of a block and grows by `growth` per step up to
    `most`. Its threshold, falling step by step, is `commit: {kind: threshold, decay: 0.02}`.
    """

    kind: Literal["smoothing"] = "smoothing"
    first: float = 0.15
    growth: float = 0.02
    most: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("first", "growth", "most"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0")

    def init(self, model, params, rows, width):
        del params
        zeros = jnp.zeros((rows, width, model.config.hidden_size), jnp.float32)
        return {"weight": jnp.zeros(rows, jnp.float32), "delta": zeros}

    def embed(self, mask, state):
        weight = state["weight"][:, None, None]
        return (1.0 - weight) * mask.astype(jnp.float32) + weight * state["delta"]

    def update(self, model, params, logits, step, state):
        del state
        config = model.config
        rows = logits.reshape(-1, logits.shape[-1])
        delta = residual.from_logits(
            rows,
            params["embed"]["embedding"],
            ResidualSettings(temperature=self.temperature, temper_delta=True),
            mask_id=config.tokens.mask,
            vocab_size=config.vocab_size,
        ).delta
        weight = jnp.minimum(self.first + self.growth * step.astype(jnp.float32), self.most)
        return {"weight": weight, "delta": delta.reshape(*logits.shape[:-1], -1)}


@dataclass(frozen=True, kw_only=True)
class Credit(Context):
    """Raise the logits of tokens that a position has predicted before: credit decoding of dInfer
    (arXiv 2510.08666). Holds a float32 table of block x vocabulary per row.

    Every step the table fades by `fading`, each masked position's best token gains its probability
    to the power `sharpness`, and `strength` times log(1 + credit) is added to the logits.
    """

    kind: Literal["credit"] = "credit"
    strength: float = 0.7
    fading: float = 0.8
    sharpness: float = 0.2

    def __post_init__(self) -> None:
        for name in ("strength", "sharpness"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if not 0 <= self.fading < 1:
            raise ValueError(f"fading={self.fading} must lie in [0, 1)")

    def init(self, model, params, rows, width):
        del params
        return jnp.zeros((rows, width, model.config.embedding_size), jnp.float32)

    def adjust(self, logits, masked, state):
        logits = logits.astype(jnp.float32)
        best = jnp.argmax(logits, axis=-1)[..., None]
        chance = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        gain = jnp.where(masked, chance**self.sharpness, 0.0)
        place = jnp.arange(logits.shape[-1]) == best
        state = self.fading * state + jnp.where(place, gain[..., None], 0.0)
        return logits + self.strength * jnp.log1p(state), state


ContextConfig = NoContext | Residual | Smoothing | Credit
