# SPDX-License-Identifier: Apache-2.0
"""Named real shapes of decode attention over packed caches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One layer of a published model over full caches."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    slots: int


_MODELS = {"llama3_8b": (32, 8, 128), "llama2_7b": (32, 32, 128)}
_CONTEXTS = {"4k": (16, 4096), "32k": (4, 32768), "128k": (1, 131072)}

SHAPES = {
    f"{model}_{context}": Shape(*sizes, *length)
    for model, sizes in _MODELS.items()
    for context, length in _CONTEXTS.items()
}
"""Batches are chosen so that all contexts hold some tens of thousands of tokens or more."""
