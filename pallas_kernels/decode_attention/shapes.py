# SPDX-License-Identifier: Apache-2.0
"""Named real shapes of decode attention, used by tests and benchmarks alike."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer of a published model: query heads, kv heads, head width, query rows, window."""

    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    window: int | None = None
    softcap: float | None = None


SHAPES = {
    "llama3_8b": Shape(32, 8, 128),
    "llama3_70b_tp8": Shape(8, 1, 128),
    "llama2_7b": Shape(32, 32, 128),
    "llama3_1b": Shape(32, 8, 64),
    "mistral_7b_window": Shape(32, 8, 128, window=4096),
    "qwen3_8b_verify8": Shape(32, 8, 128, rows=8),
    "sdar_4b_block16": Shape(32, 8, 128, rows=16),
    "llada_8b_block32": Shape(32, 32, 128, rows=32),
    "dream_7b_block64": Shape(28, 4, 128, rows=64),
    "phi3_mini": Shape(32, 32, 96),
    "phi2": Shape(32, 32, 80),
    "gemma2_9b_softcap": Shape(16, 8, 256, softcap=50.0),
}
"""Heads and widths of the models' published configurations."""
