# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction: the objective of autoregressive language models."""

from dataclasses import dataclass
from typing import Any, Literal

from sqzjax.models.config import ModelConfig
from train.model_source import setting
from train.objectives.base import LossOutput, Reference


@dataclass(frozen=True, kw_only=True)
class LanguageModeling:
    """Cross-entropy of each token given its predecessors in the same document.

    A token is a target where `loss_mask` is true and the token before it in the row belongs to the
    same segment. `z_loss` (arXiv 2204.02311, 1e-4 there) keeps the logits from drifting.
    """

    kind: Literal["lm"] = "lm"
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < 1:
            raise ValueError(f"z_loss={self.z_loss} must lie in [0, 1); 1e-4 is usual")

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Refuse models whose attention can see the token to be predicted."""
        del seq_len
        if config.mask != "causal":
            raise ValueError(
                f"objective.kind='lm' needs a causal model and mask={config.mask!r} shows a token "
                f"its successors; set {setting('mask', 'causal')} or choose another objective"
            )

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
        """Return the loss with the metric "accuracy"."""
        from sqzjax import losses

        del key, train, reference
        targets, weights = next_token_targets(batch)
        out = model.forward(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            logits="none",
            return_hidden="last",
            lora=lora,
        )
        tied = model.config.tie_embeddings
        table = losses.head_table(params, tied)
        result = losses.cross_entropy(
            out.hidden, table, targets, weights, tied=tied, z_loss=self.z_loss
        )
        return LossOutput(result.sum, result.weight, {"accuracy": (result.correct, result.weight)})


def next_token_targets(batch: Any) -> tuple[Any, Any]:
    """Return targets int32 [B, T] and weights float32 [B, T]; the last column weighs nothing."""
    import jax.numpy as jnp

    def following(x: Any) -> Any:
        return jnp.roll(x, -1, axis=1)  # the last column gets the first, which never counts

    segments = batch["segment_ids"]
    valid = following(batch["loss_mask"]) & (segments >= 0) & (following(segments) == segments)
    valid = valid.at[:, -1].set(False)
    return following(batch["tokens"]), valid.astype(jnp.float32)
