# SPDX-License-Identifier: Apache-2.0
"""Residual context diffusion (RCD, arXiv 2601.22954): learn to use discarded predictions.

While decoding, predictions of positions that stay masked come back as residuals of their mask
embeddings (`sqzjax.residual`). Training needs no decoding steps for that: a frozen light model of
the same vocabulary predicts the same noisy text, and its residuals go into the target. Pick it for
a model that decodes many tokens per step; a step costs the reference's forward pass and two
products with the embedding more than plain masked diffusion.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sqzjax.models.config import ModelConfig, check_reference
from sqzjax.residual_config import ResidualSettings
from train.model_source import ModelSource
from train.objectives.base import LossOutput, Reference, row_uniform
from train.objectives.diffusion import (
    BlockDiffusion,
    MaskedDiffusion,
    noisy_hidden,
    weighted_loss,
)


@dataclass(frozen=True, kw_only=True)
class RCD:
    """Masked diffusion with the residuals of a reference in the mask embeddings (Algorithm 1).

    `diffusion` is the objective without residuals: noise, layout and normaliser are its own. The
    reference sees the same noisy text; its predictions are constants, and gradients flow into the
    target's embedding through the mixture. A `reference` of null is the model itself, as it is at
    each step, without gradient: no second model is held, and decoding, which has no other residuals
    than the model's own, then meets what it was trained on (self-conditioning, arXiv 2208.04202;
    give it `cold_rows`). `residual.mask_column`, `alpha_rule` and `alpha_scale` should be those
    that decoding uses. With `alpha_scale` 0 this is `diffusion`, bit for bit. `cold_rows` is the
    share of rows that train without residuals, as the first step of a block is decoded that has
    none yet; the paper has 0.
    """

    kind: Literal["rcd"] = "rcd"
    reference: ModelSource | None
    diffusion: BlockDiffusion | MaskedDiffusion = BlockDiffusion()
    residual: ResidualSettings = ResidualSettings()
    cold_rows: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.cold_rows < 1:
            raise ValueError(f"cold_rows={self.cold_rows} must lie in [0, 1); 0 is the paper's")

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Refuse what `diffusion` refuses, and references that read another kind of text."""
        self.diffusion.check(config, seq_len)
        if self.reference is None:
            return
        reference = self.reference.resolve()
        check_reference(reference, config)
        if seq_len > reference.max_positions:
            raise ValueError(
                f"seq_len={seq_len} exceeds the reference's max_positions="
                f"{reference.max_positions}; shorten it, or set "
                "objective.reference.adjust.max_positions"
            )

    def check_data(self, dataset: Any, config: ModelConfig) -> None:
        """Refuse what `diffusion` refuses."""
        self.diffusion.check_data(dataset, config)

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
        """Return the loss; "alpha" is the mean weight of residuals at masked positions."""
        import jax
        import jax.numpy as jnp

        from sqzjax import residual

        if not self.residual.alpha_scale:  # the baseline, at its own cost
            return self.diffusion.loss(model, params, batch, key, train=train, lora=lora)
        if reference is None and self.reference is not None:
            raise ValueError("objective.kind='rcd' needs reference=Reference(model, params)")
        noised = self.diffusion.noised(model.config, batch, key)
        own = reference or Reference(model, params)
        found = self._residual(model, params, noised, own, None if reference else lora)
        if self.cold_rows:
            # Folding in 0 or 1 gives the two keys that `noised` splits this one into.
            warm = row_uniform(batch, jax.random.fold_in(key, 2)) >= self.cold_rows
            found = found._replace(alpha=found.alpha * _per_token(warm, noised.masked))
        inputs = dict(noised.inputs)
        embeds = jnp.take(params["embed"]["embedding"], inputs.pop("tokens"), axis=0)
        length = noised.masked.shape[1]
        noisy = residual.inject(embeds[:, :length], found, noised.masked)
        inputs["embeds"] = jnp.concatenate([noisy, embeds[:, length:]], axis=1)
        hidden = noisy_hidden(model, params, noised, inputs, lora=lora)
        output = weighted_loss(model, params, hidden, batch, noised, self.diffusion.normalizer)
        alpha = (jnp.sum(found.alpha), jnp.sum(noised.masked).astype(jnp.float32))
        return output._replace(metrics={**output.metrics, "alpha": alpha})

    def _residual(
        self, model: Any, params: Any, noised: Any, reference: Reference, lora: Any
    ) -> Any:
        """Return what the reference's predictions of masked tokens leave behind."""
        import jax

        from sqzjax import losses, residual

        frozen, lora = jax.lax.stop_gradient((reference.params, lora))
        hidden = noisy_hidden(reference.model, frozen, noised, noised.inputs, lora=lora)
        tied = reference.model.config.tie_embeddings
        # Every device moves the masked rows of its own texts together.
        groups = losses.batch_ways()
        return residual.from_hidden(
            hidden.reshape(-1, hidden.shape[-1]),
            losses.head_table(frozen, tied),
            params["embed"]["embedding"],
            self.residual,
            tied=tied,
            mask_id=model.config.tokens.mask,
            vocab_size=model.config.vocab_size,
            rows=noised.masked.reshape(-1),
            groups=groups if hidden.shape[0] % groups == 0 else 1,
        )


def _per_token(rows: Any, masked: Any) -> Any:
    """Return what is given per row of the batch for each token of its views, flattened."""
    import jax.numpy as jnp

    return jnp.repeat(rows, masked.size // rows.shape[0])
