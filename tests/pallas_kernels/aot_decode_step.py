# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compile cases of a whole decode step: the cache stays where it is.

Two layers of published models with their cache donated, as `decode.base.advance` does. The step may
neither copy nor transpose anything near the size of a layer's keys, and its temporaries stay far
below it: scores, partial outputs and logits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sqzjax.kvcache import KIVI, Dense, LoSA, Quest
from sqzjax.models import SIZES, DecoderLM, Execution
from tests.aot import Case

# name of the preset: batch, slots, query rows (64: a block of a diffusion model)
STEPS = {
    "llama3_8b": (1, 32768, 1),
    "llama3.2_1b": (8, 4096, 1),
    "qwen3_8b": (32, 2048, 1),
    "mistral_7b_v0.1": (2, 8192, 8),
    "sdar_8b": (4, 8192, 16),
    "llada_8b": (2, 4096, 32),
}
# Each is compiled by the default tests for one TPU.
_SLOW = {"llama3_8b": ("v5e",), "mistral_7b_v0.1": ("v6e",)}


# Other policies: a quarter of the context in pages that suit a TPU and a GPU; packed groups.
POLICIES = (
    ("llama3_8b", 4, 32768, 1, Quest(budget=8192, page_size=64, dense_layers=0)),
    ("sdar_8b", 4, 32768, 16, LoSA(budget=1024, page_size=64, dense_layers=0, active_tokens=8)),
    ("llama3_8b", 4, 8192, 1, KIVI(bits=4)),
)


def _case(name: str, batch: int, slots: int, rows: int, policy: Any = Dense(), **checks) -> Case:
    config = dataclasses.replace(SIZES[name], num_layers=2, window_layers=())
    execution = Execution(dtype="bfloat16", param_dtype="bfloat16", scan_layers=False)
    model = DecoderLM(config, execution)
    caches = jax.eval_shape(
        lambda: model.init_caches(policy, batch=batch, capacity=slots, max_new=64)
    )
    tokens = jax.ShapeDtypeStruct((batch, rows), jnp.int32)

    def step(params, tokens, caches):
        positions = caches.length[:, None] + jnp.arange(rows, dtype=jnp.int32)
        out = model.forward(params, tokens, positions=positions, caches=caches)
        return jnp.argmax(out.logits, axis=-1), out.caches

    held = batch * config.num_kv_heads * min(slots, _held(config, slots)) * config.head_dim
    return Case(
        f"{name}_b{batch}_s{slots}_t{rows}_{policy.kind}",
        step,
        (model.abstract_params(), tokens, caches),
        targets=("h200", "v5e", "v6e"),
        donate=(2,),
        # Codes of 4 bits are an eighth of the elements.
        max_copied=held // 8 - 1,
        max_temporaries=2 * held if policy.kind == "dense" else held,
        **{"slow": _SLOW.get(name, True), **checks},
    )


def _held(config, slots: int) -> int:
    """Slots of a layer: a window's ring, or all."""
    window = config.layer_windows[0]
    return slots if window is None else window


def aot_cases() -> list[Case]:
    """Return a case per step."""
    others = [
        _case(*sizes, slow=("v6e",) if sizes[-1].kind == "quest" else True) for sizes in POLICIES
    ]
    return [*(_case(name, *sizes) for name, sizes in STEPS.items()), *others]
