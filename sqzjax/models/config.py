# SPDX-License-Identifier: Apache-2.0
"""What a decoder is (`ModelConfig`) and how it is executed (`Execution`).

One configuration covers Llama 1/2/3, Mistral, Qwen2/2.5, Qwen3, LLaDA, Dream and SDAR: the families
differ only in biases, norms, rotary embedding, mask and tying. `sqzjax.io.hf` translates a Hugging
Face `config.json` to and from it.
"""

from dataclasses import dataclass, field
from typing import Literal

from sqzjax.attention.rope_config import RopeConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "llada", "dream", "sdar")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids that generation and training treat specially; None where the model has none."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    mask: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a pre-norm decoder with rotary attention and a gated SiLU feed-forward.

    Zero in `num_kv_heads`, `head_dim` or `embedding_size` means derive it: `num_heads`,
    `hidden_size // num_heads`, `vocab_size`. `embedding_size > vocab_size` is padding of the
    embedding and head rows (LLaDA). `shift_logits`: row i predicts token i + 1 although attention
    is bidirectional (Dream). `window_layers` marks the layers that use `sliding_window`; empty
    means all of them.
    """

    family: Literal["llama", "mistral", "qwen2", "qwen3", "llada", "dream", "sdar"] = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    embedding_size: int = 0
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mask: Literal["causal", "bidirectional", "block_causal"] = "causal"
    block_size: int = 0
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    shift_logits: bool = False
    tokens: SpecialTokens = field(default_factory=SpecialTokens)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            _positive(name, getattr(self, name))
        _positive("max_positions", self.max_positions)
        if not self.head_dim and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
                f"; use {_nearest(self.hidden_size, self.num_heads)} or set head_dim"
            )
        _derive(self, "num_kv_heads", self.num_heads)
        _derive(self, "head_dim", self.hidden_size // self.num_heads)
        _derive(self, "embedding_size", self.vocab_size)
        self._check_relations()

    def _check_relations(self) -> None:
        if self.num_heads % self.num_kv_heads:
            divisors = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
                f"use one of {divisors}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary embedding")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size={self.embedding_size} must be >= vocab_size={self.vocab_size}; "
                "use 0 to derive it"
            )
        if self.mask == "block_causal" and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be >= 1 for mask='block_causal'")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be >= 1, or null for none")
        if self.window_layers and len(self.window_layers) != self.num_layers:
            raise ValueError(
                f"window_layers has {len(self.window_layers)} entries, the model num_layers="
                f"{self.num_layers}; give one per layer or none"
            )
        special = (*self.tokens.eos, self.tokens.bos, self.tokens.pad, self.tokens.mask)
        for token in special:
            if token is not None and not 0 <= token < self.embedding_size:
                raise ValueError(f"special token id {token} must lie in [0, {self.embedding_size})")

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer; None where a layer attends to everything."""
        marks = self.window_layers or (True,) * self.num_layers
        return tuple(self.sliding_window if mark else None for mark in marks)

    @property
    def num_params(self) -> int:
        """Number of parameters, tied embeddings counted once, padded rows included."""
        heads = self.num_heads * self.head_dim
        kv_heads = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (heads + kv_heads)
        attention += (heads + 2 * kv_heads) * self.qkv_bias + self.hidden_size * self.out_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.embedding_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        layer = attention + mlp + 2 * self.hidden_size
        return self.num_layers * layer + embeddings + self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model runs: nothing here changes the function it computes beyond rounding.

    `dtype` is the compute dtype (norms, softmax and logits are float32 always), `param_dtype` the
    dtype parameters are created in. `scan_layers=True` stacks the layers for one compiled block
    (training); `False` unrolls them, which decodes faster because no layer's cache is sliced out
    of a stack. `remat` trades compute for activation memory in the backward pass.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots"] = "none"


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1")


def _derive(config: ModelConfig, name: str, default: int) -> None:
    value = getattr(config, name)
    if value < 0:
        raise ValueError(f"{name}={value} must be >= 1, or 0 to derive it")
    # The dataclass is frozen; deriving here keeps every later reader free of special cases.
    object.__setattr__(config, name, value or default)


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


__all__ = ["FAMILIES", "Execution", "ModelConfig", "RopeConfig", "SpecialTokens"]


def check_reference(reference: ModelConfig, target: ModelConfig) -> None:
    """Raise ValueError unless a reference can predict the target's masked tokens."""
    if reference.vocab_size != target.vocab_size:
        raise ValueError(
            f"the reference has vocab_size={reference.vocab_size} and the model "
            f"{target.vocab_size}: residuals cross token by token; use a reference with the "
            "model's tokenizer"
        )
    if reference.tokens.mask not in (None, target.tokens.mask):
        raise ValueError(
            f"the reference has mask token {reference.tokens.mask} and the model "
            f"{target.tokens.mask}; both read one noisy text and must share it "
            "(adjust.mask_token of the reference)"
        )
    kinds = (reference.mask, reference.block_size), (target.mask, target.block_size)
    if reference.mask != target.mask or (reference.mask == "block_causal" and kinds[0] != kinds[1]):
        raise ValueError(
            f"the reference has (mask, block_size)={kinds[0]} and the model {kinds[1]}; they "
            "must be equal (adjust of the reference)"
        )
