# SPDX-License-Identifier: Apache-2.0
"""What a training step costs in FLOPs, by its objective. Nothing here imports jax.

The one place that sweeps and the reported utilisation (`throughput/mfu`) ask. A multiply-add is two
operations, the backward pass twice the forward one; every score of attention counts, masked or not,
and recomputation does not.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqzjax.models.config import ModelConfig
from train.config import TrainConfig
from train.objectives import CDLM, RCD, BlockDiffusion


class Pass(NamedTuple):
    """`rows` texts of `length` tokens through a model, `predicted` of them through its head.

    `length` 0 is the head alone; without `trained` there is no backward pass.
    """

    model: ModelConfig
    rows: int
    length: int
    predicted: float
    trained: bool = True

    @property
    def flops(self) -> float:
        """Operations of the pass, its backward pass included."""
        from sqzjax.analysis import Precision, Workload, operators

        head = 2.0 * self.rows * self.predicted * self.model.hidden_size
        total = head * self.model.embedding_size
        if self.length:
            work = Workload(phase="prefill", batch=self.rows, context=self.length, logit_rows=0)
            found = operators(self.model, Precision(), work)
            total += sum(one.flops * one.count for one in found)
        return total * (3 if self.trained else 1)


def rollout_of(config: TrainConfig) -> int:
    """Return how many model steps one training step applies in a row."""
    return getattr(config.objective, "rollout", 1)


def step_flops(config: TrainConfig, model: Any) -> float:
    """Return the operations of one training step of a run with this architecture."""
    if config.family == "fields":
        from sqzjax.analysis import swin_flops

        return float(swin_flops.training_flops(model, config.batch_size, rollout_of(config)))
    return sum(one.flops for one in _passes(config.objective, model, config))


def _passes(objective: Any, model: ModelConfig, config: TrainConfig) -> Iterator[Pass]:
    """Yield what a step of a language model runs."""
    rows, length = config.batch_size, config.seq_len
    if isinstance(objective, RCD):
        yield from _residual_passes(objective, model, config)
    elif isinstance(objective, CDLM):
        yield from _distillation_passes(objective, model, config)
    elif isinstance(objective, BlockDiffusion):
        views = 2 if objective.complementary else 1
        yield Pass(model, rows * views, 2 * length, length)  # the clean half predicts nothing
    else:
        yield Pass(model, rows, length, length)


def _residual_passes(objective: RCD, model: ModelConfig, config: TrainConfig) -> Iterator[Pass]:
    """Yield the passes of the target, and of the reference where residuals are wanted.

    Masked tokens alone, half of all, take residuals: a row of the reference's head and a mixture
    of the target's embeddings, whose backward pass is one product, as the weights are constants.
    """
    passes = list(_passes(objective.diffusion, model, config))
    yield from passes
    if objective.residual.alpha_scale:
        reference = model if objective.reference is None else objective.reference.resolve()
        for one in passes:
            masked = one.predicted / 2
            yield Pass(reference, one.rows, one.length, masked, trained=False)
            yield Pass(model, 2 * one.rows, 0, masked, trained=False)


def _distillation_passes(
    objective: CDLM, model: ModelConfig, config: TrainConfig
) -> Iterator[Pass]:
    """Yield the passes that the weights ask for; responses are taken to fill their rows."""
    rows, length = config.batch_size, config.seq_len
    block = min(model.block_size, length)
    if objective.distillation or objective.consistency:
        yield Pass(model, rows, length, length if objective.consistency else 0)
    if objective.distillation:
        teacher = model if objective.reference is None else objective.reference.resolve()
        yield Pass(model, rows, 0, block)
        yield Pass(teacher, rows, 0, block, trained=False)
    if objective.consistency:
        yield Pass(model, rows, length, length, trained=False)
    if objective.mask_prediction:
        yield Pass(model, rows, length, length)
