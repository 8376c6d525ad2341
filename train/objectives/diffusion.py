# SPDX-License-Identifier: Apache-2.0
"""Objectives of masked diffusion language models: whole sequences, and blocks.

Tokens are replaced by the mask id with probability p = (1 - eps) t + eps at a noise level t, and
predicted where they were; 1/p weights make the mean an upper bound of the negative log-likelihood.
The noise level is not fed to the network.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqzjax.models.config import ModelConfig
from train.model_source import setting
from train.objectives.base import LossOutput, Reference, row_uniform

Normalizer = Literal["token", "sequence", "batch"]
_GOLDEN = (5**0.5 - 1) / 2
_TOKENS_READ = 1 << 24


class Noised(NamedTuple):
    """What a draw of the noise makes of a batch `[B, T]`: n views of each row, side by side.

    The model runs on `inputs` (arguments of `forward`), whose first T positions hold the noisy
    text; `masked` tells which of its tokens were replaced, each with probability `chance` in one
    of the views.
    """

    masked: Any  # B*n T bool
    chance: Any  # B*n T float32
    inputs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class NoisyTokens(ABC):
    """What the objectives share: their noise differs, their loss does not.

    `normalizer`: "token" divides by the maskable tokens of the batch, "sequence" each row by its
    own and then by the rows (LLaDA's fine-tuning), "batch" by the rows. `min_noise` is eps.
    """

    min_noise: float = 1e-3
    normalizer: Normalizer = "token"

    def __post_init__(self) -> None:
        if not 0 < self.min_noise < 1:
            raise ValueError(f"min_noise={self.min_noise} must lie in (0, 1); 1e-3 is usual")

    def check_data(self, dataset: Any, config: ModelConfig) -> None:
        """Refuse documents in which the mask token stands for text; not all of them are read."""
        for part in getattr(dataset, "parts", ()):
            if (part.train.tokens[:_TOKENS_READ] == config.tokens.mask).any():
                raise ValueError(
                    f"the mask token {config.tokens.mask} occurs in the {part.kind} source, so a "
                    "masked token could not be told from text; set "
                    + setting("mask_token", "an id that no text uses", "tokens.mask")
                )

    @abstractmethod
    def noised(self, config: ModelConfig, batch: Any, key: Any) -> Noised:
        """Draw the noise of a batch."""

    def loss(
        self,
        model: Any,
        params: Any,
        batch: Any,
        key: Any,
        *,
        train: bool,
        lora: Any = None,
        reference: Reference | None = None,
    ) -> LossOutput:
        """Return the loss, with "accuracy" weighted like it and "masked", the share masked."""
        del train, reference
        noised = self.noised(model.config, batch, key)
        hidden = noisy_hidden(model, params, noised, noised.inputs, lora=lora)
        return weighted_loss(model, params, hidden, batch, noised, self.normalizer)


@dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(NoisyTokens):
    """Predict masked tokens of a sequence from all others (LLaDA, arXiv 2502.09992; Dream).

    One noise level per row. Tokens outside `loss_mask` (prompts) are never masked. `stratified`
    spreads the noise levels of a batch evenly, which lowers the variance of the loss.
    """

    kind: Literal["masked_diffusion"] = "masked_diffusion"
    stratified: bool = False

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Refuse models without a mask token, and those that cannot see both sides."""
        del seq_len
        _check_mask_token(self.kind, config)
        if config.mask != "bidirectional":
            raise ValueError(
                f"objective.kind={self.kind!r} needs a bidirectional model, not mask="
                f"{config.mask!r}; set {setting('mask', 'bidirectional')}, or train a block-causal "
                "model with kind: block_diffusion"
            )

    def noised(self, config: ModelConfig, batch: Any, key: Any) -> Noised:
        """Draw the noise of a batch."""
        import jax
        import jax.numpy as jnp

        noise_key, mask_key = jax.random.split(key)
        level = row_uniform(batch, noise_key)
        if self.stratified:
            # Multiples of the golden ratio fill the circle evenly, whatever their number.
            rows = batch["row"] if "row" in batch else jnp.arange(len(level))
            level = (jax.random.uniform(noise_key) + rows * _GOLDEN) % 1.0
        chance = jnp.broadcast_to(_chance(level, self.min_noise)[:, None], batch["tokens"].shape)
        masked, noisy = _corrupt(config, batch, chance, mask_key)
        return Noised(
            masked,
            chance,
            {
                "tokens": noisy,
                "positions": batch["positions"],
                "segment_ids": batch["segment_ids"],
            },
        )


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion(NoisyTokens):
    """Predict masked tokens of a block from the block and the clean ones before it.

    BD3-LM (arXiv 2503.09573), SDAR (arXiv 2510.06303): both copies of a text, noisy and clean, run
    in one pass of twice the length, so that every block is trained as it is decoded. `noise_per`
    "block" draws a noise level for each block (BD3-LM), "sequence" one for each text, also of
    those packed into a row (SDAR).

    `complementary` also trains the view of each row in which exactly the other tokens are masked
    (Fast-dLLM v2, arXiv 2509.26328): a step predicts every token once, with weight 1, so the loss
    is a mean and no bound of the likelihood, and costs twice as much. Where the model's logits are
    shifted, as those of a converted autoregressive model may stay, the first token of a block is
    predicted from the clean token before it, the others from the noisy block.
    """

    kind: Literal["block_diffusion"] = "block_diffusion"
    noise_per: Literal["block", "sequence"] = "block"
    complementary: bool = False

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Refuse models that are not block-causal, and rows of broken blocks."""
        _check_mask_token(self.kind, config)
        if config.mask != "block_causal":
            raise ValueError(
                f"objective.kind={self.kind!r} needs a block-causal model, not mask="
                f"{config.mask!r}; set {setting('mask', 'block_causal')}, and block_size beside "
                "it"
            )
        if seq_len % config.block_size:
            raise ValueError(
                f"seq_len={seq_len} must be a multiple of the model's block_size="
                f"{config.block_size}"
            )

    def noised(self, config: ModelConfig, batch: Any, key: Any) -> Noised:
        """Draw the noise of a batch; the clean text follows the noisy one."""
        import jax
        import jax.numpy as jnp

        from sqzjax.attention import Mask

        length = batch["tokens"].shape[1]
        noise_key, mask_key = jax.random.split(key)
        # The slot of the first token names a block or a text, however texts are packed.
        inside = batch["positions"]
        if self.noise_per == "block":
            inside = inside % config.block_size
        place = jnp.clip(jnp.arange(length) - inside, 0, length - 1)  # padding is at -1
        level = jnp.take_along_axis(row_uniform(batch, noise_key, (length,)), place, axis=1)
        chance = _chance(level, self.min_noise)
        masked, noisy = _corrupt(config, batch, chance, mask_key)
        if self.complementary:
            batch, masked, noisy = _with_complement(config, batch, masked)
            chance = jnp.ones(masked.shape, jnp.float32)

        def twice(first, second):
            return jnp.concatenate([first, second], axis=1)

        return Noised(
            masked,
            chance,
            {
                "tokens": twice(noisy, batch["tokens"]),
                "positions": twice(batch["positions"], batch["positions"]),
                "segment_ids": twice(batch["segment_ids"], batch["segment_ids"]),
                "mask": Mask(kind="noisy_clean", block_size=config.block_size),
            },
        )


def noisy_hidden(
    model: Any, params: Any, noised: Noised, inputs: dict[str, Any], *, lora: Any = None
) -> Any:
    """Return the final-norm states `[B, T, D]` that predict the tokens of the noisy text."""
    import jax.numpy as jnp

    out = model.forward(params, **inputs, logits="none", return_hidden="last", lora=lora)
    length = noised.masked.shape[1]
    hidden, clean = out.hidden[:, :length], out.hidden[:, length:]
    if not model.config.shift_logits:
        return hidden
    before = jnp.roll(hidden, 1, axis=1)
    if not clean.shape[1]:
        return before
    # The token before a block is final when the block is decoded: its clean copy predicts.
    opens = inputs["positions"][:, :length] % model.config.block_size == 0
    return jnp.where(opens[..., None], jnp.roll(clean, 1, axis=1), before)


def _chance(level: Any, least: float) -> Any:
    """Return the probability of masking at a noise level in [0, 1)."""
    return (1.0 - least) * level + least


def _corrupt(config: ModelConfig, batch: Any, chance: Any, key: Any) -> tuple[Any, Any]:
    """Return which tokens are masked, and the tokens with the mask id there."""
    masked = _maskable(config, batch) & (row_uniform(batch, key, chance.shape[1:]) < chance)
    return masked, _hide(config, batch["tokens"], masked)


def _with_complement(config: ModelConfig, batch: Any, masked: Any) -> tuple[Any, Any, Any]:
    """Return two views of each row: the batch, which tokens are masked, and the noisy tokens.

    The views of a row lie side by side, so that its device keeps them.
    """
    import jax.numpy as jnp

    other = _maskable(config, batch) & ~masked
    masked = jnp.stack([masked, other], axis=1).reshape(-1, masked.shape[1])
    batch = {name: jnp.repeat(column, 2, axis=0) for name, column in batch.items()}
    return batch, masked, _hide(config, batch["tokens"], masked)


def _hide(config: ModelConfig, tokens: Any, masked: Any) -> Any:
    """Return the tokens with the mask id where they are masked."""
    import jax.numpy as jnp

    assert config.tokens.mask is not None  # `check` refuses such models
    return jnp.where(masked, config.tokens.mask, tokens)


def _maskable(config: ModelConfig, batch: Any) -> Any:
    """Return the tokens that may be masked: those to learn that something can predict."""
    import jax.numpy as jnp

    maskable = batch["loss_mask"] & (batch["segment_ids"] >= 0)
    if config.shift_logits:  # the first token of a text has nothing before it
        before = jnp.roll(batch["segment_ids"], 1, axis=1).at[:, 0].set(-1)
        maskable &= before == batch["segment_ids"]
    return maskable


def weighted_loss(
    model: Any, params: Any, hidden: Any, batch: Any, noised: Noised, normalizer: Normalizer
) -> LossOutput:
    """Return the weighted cross-entropy of the masked tokens over the normaliser."""
    import jax.numpy as jnp

    from sqzjax import losses

    masked, chance = noised.masked, noised.chance
    views = masked.shape[0] // batch["tokens"].shape[0]
    targets = jnp.repeat(batch["tokens"], views, axis=0)
    count = jnp.sum(_maskable(model.config, batch), axis=1, keepdims=True)
    weights = masked / chance
    if normalizer == "sequence":
        weights = weights / jnp.maximum(jnp.repeat(count, views, axis=0), 1)
    tied = model.config.tie_embeddings
    table = losses.head_table(params, tied)
    result = losses.cross_entropy(hidden, table, targets, weights, tied=tied)
    total = jnp.sum(count) if normalizer == "token" else jnp.sum(count > 0)
    shown = (views * jnp.sum(count)).astype(jnp.float32)
    metrics = {
        "accuracy": (result.correct, result.weight),
        "masked": (jnp.sum(masked).astype(jnp.float32), shown),
    }
    return LossOutput(result.sum, total.astype(jnp.float32), metrics)


def _check_mask_token(kind: str, config: ModelConfig) -> None:
    if config.tokens.mask is None:
        raise ValueError(
            f"objective.kind={kind!r} needs a mask token; set "
            + setting("mask_token", "an id that no text uses", "tokens.mask")
        )
