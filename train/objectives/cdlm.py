# SPDX-License-Identifier: Apache-2.0
"""CDLM (arXiv 2511.19269): a block-causal student of a bidirectional masked diffusion teacher.

The student learns from recorded teacher trajectories (`data.kind: trajectories`) to fill several
tokens per step, and, being block-causal, has an exact cache of finished blocks. Pick it to make an
existing diffusion model fast; it costs one slow pass of the teacher over the prompts, then three
forward and two backward passes per step.

Blocks are counted from position 0, in the recording, in training and in decoding, so the first
one holds the prompt's tail. The prompt is block-causal too: a prompt token sees its own block and
the ones before it.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqzjax.models.config import ModelConfig
from train.model_source import ModelSource, setting
from train.objectives.base import LossOutput, Reference, row_uniform


@dataclass(frozen=True, kw_only=True)
class CDLM:
    """Distil trajectories: a weighted sum of three losses (Algorithm 2), averaged over rows.

    A row's state is that before a uniformly drawn step; its block completion is the state when
    the current block is full. `distillation`: KL from the teacher's recorded distributions to the
    student's at the positions filled in between. `consistency`: KL from the student at the
    completion (without gradient) to the student at the state, at positions masked in both.
    `mask_prediction`: cross-entropy of randomly masked reference responses, over the noise level
    (at least `min_noise`). A weight of 0 leaves out the loss and the passes that it alone needs.

    `temperature` divides the logits on both sides of the distillation, whose loss is multiplied
    by its square. The teacher's head is that of `reference`, or, training adapters, of the frozen
    model that they are trained for.
    """

    kind: Literal["cdlm"] = "cdlm"
    distillation: float = 1.0
    consistency: float = 0.5
    mask_prediction: float = 0.01
    temperature: float = 1.0
    min_noise: float = 1e-3
    reference: ModelSource | None = None

    def __post_init__(self) -> None:
        weights = (self.distillation, self.consistency, self.mask_prediction)
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(
                f"distillation={weights[0]}, consistency={weights[1]}, mask_prediction="
                f"{weights[2]} must be weights >= 0, one of them > 0"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be > 0; 1 is usual")
        if not 0 < self.min_noise < 1:
            raise ValueError(f"min_noise={self.min_noise} must lie in (0, 1); 1e-3 is usual")

    def check(self, config: ModelConfig, seq_len: int) -> None:
        """Refuse students that are not block-causal or have no mask token."""
        del seq_len
        if config.tokens.mask is None:
            raise ValueError(
                f"objective.kind={self.kind!r} needs a mask token; set "
                + setting("mask_token", "the teacher's", "tokens.mask")
            )
        if config.mask != "block_causal":
            raise ValueError(
                f"objective.kind={self.kind!r} trains a block-causal student, not mask="
                f"{config.mask!r}; set {setting('mask', 'block_causal')}, and block_size "
                "beside it"
            )
        if self.distillation and self.reference is not None:
            size = self.reference.resolve().embedding_size
            if size != config.embedding_size:
                raise ValueError(
                    f"the reference has {size} rows of vocabulary and the student "
                    f"{config.embedding_size}; they must agree"
                )

    def check_run(self, *, data_kind: str, adapters: bool) -> None:
        """Refuse runs without trajectories, or without a frozen head of the teacher."""
        if data_kind != "trajectories":
            raise ValueError(
                f"objective.kind={self.kind!r} needs data.kind: trajectories, not {data_kind!r}; "
                "record them with a config of kind: collect"
            )
        if self.distillation and self.reference is None and not adapters:
            raise ValueError(
                "distillation needs the teacher's head, which training would change here; set "
                "objective.reference to the teacher, or train adapters with lora"
            )

    def check_data(self, dataset: Any, config: ModelConfig) -> None:
        """Refuse trajectories of other blocks, or of another mask token or width."""
        found = dataset.settings
        if found["block_size"] != config.block_size:
            raise ValueError(
                f"the model's block_size={config.block_size} must be the {found['block_size']} "
                "that the trajectories were recorded with"
            )
        if found["mask_token"] != config.tokens.mask:
            raise ValueError(
                f"the model's mask token {config.tokens.mask} must be the teacher's, "
                f"{found['mask_token']}; set "
                + setting("mask_token", found["mask_token"], "tokens.mask")
            )
        teacher = config if self.reference is None else self.reference.resolve()
        if self.distillation and found["hidden_size"] != teacher.hidden_size:
            raise ValueError(
                f"the trajectories hold hidden states of {found['hidden_size']} numbers, and the "
                f"head takes {teacher.hidden_size}; set objective.reference to their teacher"
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
        """Return the loss per row, with its three parts as metrics."""
        import jax.numpy as jnp

        del train
        now = draw_state(model.config, batch, key, self.min_noise)
        state, clean, noisy = self._hidden(model, params, lora, batch, now)
        rows = jnp.any(now.response, axis=1)
        parts = {}
        if self.distillation:
            teacher = _teacher_head(params, model, reference, lora)
            parts["distillation"] = (self._distil(model, params, batch, now, state, teacher), rows)
        if self.consistency:
            agree = _agree(model, params, batch, now, state, clean)
            parts["consistency"] = (agree, jnp.any(now.later, axis=1))
        if self.mask_prediction:
            parts["mask_prediction"] = (_predict(model, params, batch, now, noisy), rows)
        total = sum((getattr(self, name) * part[0] for name, part in parts.items()), 0.0)
        metrics = {name: (part, _count(counted)) for name, (part, counted) in parts.items()}
        return LossOutput(jnp.asarray(total, jnp.float32), _count(rows), metrics)

    def _hidden(self, model, params, lora, batch, now: "State") -> tuple[Any, Any, Any]:
        """Return what predicts each position: at the state, its completion, and the noisy text."""
        import jax
        import jax.numpy as jnp

        def run(params, lora, tokens):
            return _forward(model, params, lora, batch, tokens)

        mask = model.config.tokens.mask
        state = clean = noisy = None
        # Passes of their own: one over all three would also differentiate the completion's, and
        # took 1.4 times as long on CPU.
        if self.distillation or self.consistency:
            tokens = jnp.where(now.filled | now.later, mask, batch["tokens"])
            state = run(params, lora, tokens)
        if self.consistency:
            fixed = jax.lax.stop_gradient((params, lora))
            clean = run(*fixed, jnp.where(now.later, mask, batch["tokens"]))
        if self.mask_prediction:
            noisy = run(params, lora, jnp.where(now.masked, mask, batch["reference"]))
        return state, clean, noisy

    def _distil(self, model, params, batch, now: "State", hidden, teacher) -> Any:
        """Return the rows' summed mean KL over the positions that the block still lacks."""
        import jax.numpy as jnp

        from sqzjax import losses

        # Nothing else of the sequence needs logits: the block's rows alone are taken.
        size = min(model.config.block_size, now.filled.shape[1])
        index = now.block[:, None] * model.config.block_size + jnp.arange(size)
        weights = _take(_mean_weights(now.filled), index)
        student = _take(hidden, index)
        recorded = _take(batch["hidden"], index - batch["prompt_length"][:, None])
        table, tied = teacher
        scale = 1.0 / self.temperature
        return self.temperature**2 * losses.kl_divergence(
            recorded.astype(student.dtype) * scale,
            table,
            student * scale,
            losses.head_table(params, model.config.tie_embeddings),
            weights,
            teacher_tied=tied,
            student_tied=model.config.tie_embeddings,
        )


class State(NamedTuple):
    """A drawn state of every row, as masks over its positions."""

    response: Any  # B T bool: positions after the prompt
    block: Any  # B int32: the block being filled
    filled: Any  # B T bool: U, masked in the state and filled in its block completion
    later: Any  # B T bool: S, masked in both
    masked: Any  # B T bool: positions of the reference to hide
    noise: Any  # B float32: their expected share


def draw_state(config: ModelConfig, batch: Any, key: Any, min_noise: float) -> State:
    """Draw a step and a noise level per row; everything has static shapes."""
    import jax
    import jax.numpy as jnp

    step_key, noise_key, mask_key = jax.random.split(key, 3)
    response = batch["rank"] >= 0
    steps = jnp.sum(response, axis=1)
    uniform = row_uniform(batch, step_key)
    step = jnp.clip((uniform * steps).astype(jnp.int32), 0, jnp.maximum(steps - 1, 0))
    noise = jnp.maximum(row_uniform(batch, noise_key), min_noise)
    hidden = row_uniform(batch, mask_key, response.shape[1:]) < noise[:, None]
    block, filled, later = split(batch["rank"], step, config.block_size)
    return State(response, block, filled, later, hidden & response, noise)


def split(rank: Any, step: Any, block_size: int) -> tuple[Any, Any, Any]:
    """Return the block being filled before `step`, and the masks U and S of that state.

    `rank` [B, T] is the step that filled each position, -1 outside the response; blocks are those
    of `block_size` positions from 0.
    """
    import jax.numpy as jnp

    blocks = jnp.arange(rank.shape[1], dtype=jnp.int32) // block_size
    block = jnp.sum(jnp.where(rank == step[:, None], blocks, 0), axis=1)
    response = rank >= 0
    filled = response & (rank >= step[:, None]) & (blocks == block[:, None])
    return block, filled, response & (blocks > block[:, None])


def _forward(model: Any, params: Any, lora: Any, batch: Any, tokens: Any) -> Any:
    """Return the hidden state that predicts each position."""
    import jax.numpy as jnp

    out = model.forward(
        params,
        tokens,
        positions=batch["positions"],
        logits="none",
        return_hidden="last",
        lora=lora,
    )
    return jnp.roll(out.hidden, 1, axis=1) if model.config.shift_logits else out.hidden


def _agree(model: Any, params: Any, batch: Any, now: State, hidden: Any, clean: Any) -> Any:
    """Return the rows' summed mean KL from the completion's predictions to the state's."""
    from sqzjax import losses

    tied = model.config.tie_embeddings
    table = losses.head_table(params, tied)
    index = _response(batch)
    clean, hidden, weights = (_take(x, index) for x in (clean, hidden, _mean_weights(now.later)))
    return losses.kl_divergence(
        clean, table, hidden, table, weights, teacher_tied=tied, student_tied=tied
    )


def _predict(model: Any, params: Any, batch: Any, now: State, hidden: Any) -> Any:
    """Return the rows' summed cross-entropy of the hidden reference tokens over the noise."""
    import jax.numpy as jnp

    from sqzjax import losses

    count = jnp.maximum(jnp.sum(now.response, axis=1), 1)
    weights = now.masked / (now.noise * count)[:, None]
    tied = model.config.tie_embeddings
    table = losses.head_table(params, tied)
    index = _response(batch)
    hidden, targets, weights = (_take(x, index) for x in (hidden, batch["reference"], weights))
    return losses.cross_entropy(hidden, table, targets, weights, tied=tied).sum


def _teacher_head(params: Any, model: Any, reference: Reference | None, lora: Any) -> Any:
    """Return the table of the frozen head, and whether it is an embedding."""
    from sqzjax import losses

    if reference is None:
        assert lora is not None  # `check_run` refuses it
        reference = Reference(model, params)
    tied = reference.model.config.tie_embeddings
    return losses.head_table(reference.params, tied), tied


def _response(batch: Any) -> Any:
    """Return the positions of each row's response, and some after it where it is short."""
    import jax.numpy as jnp

    return batch["prompt_length"][:, None] + jnp.arange(batch["hidden"].shape[1])


def _mean_weights(mask: Any) -> Any:
    """Return weights that average over each row's marked positions; 0 where there are none."""
    import jax.numpy as jnp

    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)


def _count(rows: Any) -> Any:
    import jax.numpy as jnp

    return jnp.sum(rows).astype(jnp.float32)


def _take(x: Any, index: Any) -> Any:
    """Return `x[b, index[b]]`, and 0 for what lies outside."""
    import jax.numpy as jnp

    inside = (index >= 0) & (index < x.shape[1])
    index, inside = (a.reshape(*a.shape, *(1,) * (x.ndim - 2)) for a in (index, inside))
    found = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1)
    return jnp.where(inside, found, 0)
