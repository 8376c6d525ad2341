# SPDX-License-Identifier: Apache-2.0
"""Real shapes of prefill and training attention, for tests, benchmarks and compilation checks."""

from typing import NamedTuple

from pallas_kernels.attention.mask import AttentionMask


class Shape(NamedTuple):
    """One call: `B` sequences of `T` queries over `S` keys, `N` query and `K` kv heads of `H`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    mask: AttentionMask = AttentionMask()
    dtype: str = "bfloat16"


SHAPES = {
    # Training of a ten-million-parameter model on a CPU.
    "tiny_training": Shape(16, 256, 256, 5, 5, 64, dtype="float32"),
    "llama1b_training_2k": Shape(4, 2048, 2048, 32, 8, 64),
    "llama8b_training_8k": Shape(1, 8192, 8192, 32, 8, 128),
    "llama8b_prefill_4k": Shape(1, 4096, 4096, 32, 8, 128),
    "llama70b_prefill_8k": Shape(1, 8192, 8192, 64, 8, 128),
    "mistral_window_16k": Shape(1, 16384, 16384, 32, 8, 128, AttentionMask(window=4096)),
    # Block diffusion: prefill of a context, and the masks of its training.
    "blocks_prefill_4k": Shape(1, 4096, 4096, 16, 8, 128, AttentionMask("block_causal", 32)),
    "earlier_blocks_4k": Shape(1, 4096, 4096, 16, 8, 128, AttentionMask("earlier_blocks", 32)),
    "same_block_4k": Shape(1, 4096, 4096, 16, 8, 128, AttentionMask("same_block", 32)),
    "diffusion_4k": Shape(1, 4096, 4096, 28, 4, 128, AttentionMask("bidirectional")),
}
