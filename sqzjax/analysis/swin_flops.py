# SPDX-License-Identifier: Apache-2.0
"""Operations of a Swin emulator by the published formula. Nothing here imports jax.

The formula of arXiv 2603.25687's code, one multiply-add as two operations; norms, softmax, biases
and GELU are counted, additions of the residual stream are not. A context of several states widens
the windows and multiplies the tokens; the head reads the last state only.
"""

from sqzjax.models.swin_config import COORDINATES, SwinConfig


def forward_flops(config: SwinConfig, heads: int | None = None) -> float:
    """Return the operations of one forward pass of one sample.

    `heads` replaces the model's own number in the softmax term: the published table has 16 for
    every width. ValueError for less than one.
    """
    heads = config.heads if heads is None else heads
    if heads < 1:
        raise ValueError(f"heads={heads} must be >= 1, or None for the model's own")
    width, hidden, area = config.embed_dim, config.mlp_dim, config.patch_size**2
    length, tokens = config.window_length, config.context * config.tokens
    embeddings = (2.0 * area * config.in_channels + 1) * tokens * width
    if config.position:
        embeddings += (2 * area * COORDINATES + 1) * tokens * width
    attention = 8 * tokens * width**2 + 4 * tokens * width  # four products and their biases
    attention += 4 * tokens * length * width + 5 * heads * length * tokens
    mlp = 4 * tokens * width * hidden + tokens * (9 * hidden + width)
    norms = 12 * tokens * width
    head = 2 * config.tokens * width * config.out_channels * area
    return embeddings + config.depth * (attention + mlp + norms) + head


def training_flops(config: SwinConfig, samples: int | float, rollout: int = 1) -> float:
    """Return the operations of training on `samples`: three forward passes per rollout step.

    ValueError for negative samples and rollouts of no step.
    """
    if not samples >= 0:
        raise ValueError(f"samples={samples} must be >= 0")
    if rollout < 1:
        raise ValueError(f"rollout={rollout} must be >= 1; 1 predicts the next state")
    return 3 * forward_flops(config) * samples * rollout
