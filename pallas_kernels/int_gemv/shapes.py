# SPDX-License-Identifier: Apache-2.0
"""Linear layers of well-known models, for benchmarks, ahead-of-time compilation and tuning."""

from typing import NamedTuple


class LinearShape(NamedTuple):
    """A linear layer from `inputs` (K_in) to `outputs` (N)."""

    inputs: int
    outputs: int


def _layers(model: str, width: int, queries: int, keys: int, hidden: int, vocabulary: int):
    return {
        f"{model}/q": LinearShape(width, queries),
        f"{model}/kv": LinearShape(width, keys),
        f"{model}/o": LinearShape(queries, width),
        f"{model}/gate_up": LinearShape(width, hidden),
        f"{model}/down": LinearShape(hidden, width),
        f"{model}/head": LinearShape(width, vocabulary),
    }


SHAPES: dict[str, LinearShape] = {
    **_layers("llama3.2-1b", 2048, 2048, 512, 8192, 128256),
    **_layers("llama3-8b", 4096, 4096, 1024, 14336, 128256),
    **_layers("llama3-70b", 8192, 8192, 1024, 28672, 128256),
    **_layers("qwen2.5-1.5b", 1536, 1536, 256, 8960, 151936),
    **_layers("qwen2.5-7b", 3584, 3584, 512, 18944, 152064),
    **_layers("qwen2.5-72b", 8192, 8192, 1024, 29568, 152064),
}
"""By "model/layer"; gate and up have one shape, and so have k and v."""
