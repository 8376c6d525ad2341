# SPDX-License-Identifier: Apache-2.0
"""Translate Hugging Face `config.json` to `ModelConfig` and back.

Reading collects every problem before it fails and computes nothing from sizes it has not bounded.
Both spellings of rotary embedding are understood (`rope_theta` + `rope_scaling`, and the newer
`rope_parameters`); both are written. Switches that would change the function computed are refused,
never ignored. Code that a checkpoint ships is never run.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqzjax.errors import ConfigError
from sqzjax.io import hf_rope
from sqzjax.io.fields import Fields, show
from sqzjax.models.config import ModelConfig, SpecialTokens

_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 12,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "embedding_size": 1 << 24,
    "max_positions": 1 << 30,
}
"""Several times the largest published model; beyond them a file is taken for damaged."""
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
}
_LLADA_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "embedding_size": "embedding_size",
    "max_positions": "max_sequence_length",
}
_LLADA_SWITCHES: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "layer_norm_with_affine": True,
    "block_group_size": 1,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
}
"""The one value of each switch that the decoder computes."""
_LLADA_REQUIRED = (
    "block_type",
    "layer_norm_type",
    "activation_type",
    "rope",
    "include_bias",
)
"""Switches whose default in LLaDA's own code is another value."""
_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llada": "llada",
    "dream": "Dream",
    "sdar": "sdar",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llada": "LLaDAModelLM",
    "dream": "DreamModel",
    "sdar": "SDARForCausalLM",
}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072}
_WINDOWED = ("qwen2", "qwen3", "sdar")
"""Families that say per layer whether the sliding window applies."""
_CAUSAL = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose file may say that they are not causal (encoders made of language models)."""
_EXTENSION = "sqzjax"
"""Key of what no family's file has words for; other readers ignore it."""


def from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Translate the content of `config.json` (and of `generation_config.json`).

    Stop ids of both files are merged. Raises `ConfigError` listing every problem.
    """
    model_type = raw.get("model_type")
    families = {name.lower(): family for family, name in _MODEL_TYPES.items()}
    family = families.get(model_type.lower()) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(_MODEL_TYPES.values())
        raise ConfigError(f"model_type={show(model_type)} is not supported; supported are {known}")
    fields = Fields(raw)
    values = _llada(fields) if family == "llada" else _transformers(fields, family)
    values |= _extension(fields)
    values["tokens"] = _tokens(
        fields, Fields(generation or {}, fields.problems, "generation_config.")
    )
    if raw.get("quantization_config") is not None:
        fields.problem("quantization_config is set; only unquantized checkpoints are read")
    if fields.problems:
        raise ConfigError(fields.problems)
    try:
        return canonical(ModelConfig(family=family, **values))  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _extension(fields: Fields) -> dict[str, Any]:
    """Return what a converted model changes in its family: a student's mask, an adapted model's."""
    raw = fields.raw.get(_EXTENSION)
    if raw is None:
        return {}
    rules = {"mask": str, "block_size": int, "shift_logits": bool}
    if not isinstance(raw, dict) or any(type(raw[k]) is not rules.get(k) for k in raw):
        fields.problem(f"{_EXTENSION}={show(raw)} must be a mapping with keys among {list(rules)}")
        return {}
    return raw


def _sizes(fields: Fields, names: Mapping[str, str], defaults: Mapping[str, int | None]) -> dict:
    """Read bounded integers; a name without default is required, None as default means derive."""
    sizes = {}
    for ours, theirs in names.items():
        if ours in defaults and fields.raw.get(theirs) is None:
            sizes[ours] = defaults[ours] or 0
        else:
            sizes[ours] = fields.integer(theirs, 1, _LIMITS[ours])
    return sizes


def _transformers(fields: Fields, family: str) -> dict[str, Any]:
    qwen3_like = family in ("qwen3", "sdar")
    defaults: dict[str, int | None] = {
        "head_dim": 128 if qwen3_like and "head_dim" not in fields.raw else None,
        "max_positions": _DEFAULT_POSITIONS.get(family, 32768),
    }
    if family == "llama":
        defaults["num_kv_heads"] = None
    values = _sizes(fields, _NAMES, defaults)
    fields.only("hidden_act", "silu")
    bias = family in ("llama", "qwen3", "sdar") and fields.boolean("attention_bias", False)
    values |= {
        "norm_eps": fields.number("rms_norm_eps", 1e-6, maximum=1.0),
        "rope": hf_rope.read(fields, values["max_positions"]),
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
        "qkv_bias": bias or family in ("qwen2", "dream"),
        "out_bias": bias,
        "mlp_bias": family == "llama" and fields.boolean("mlp_bias", False),
        "qk_norm": qwen3_like,
    }
    if family == "mistral":
        values["sliding_window"] = _window(fields)
    elif family in _WINDOWED:
        values |= _layer_windows(fields, values["num_layers"])
    elif family == "dream":
        fields.only("use_sliding_window", False)
        values |= {"mask": "bidirectional", "shift_logits": True}
    if family in _CAUSAL and not fields.boolean("is_causal", True):
        if values.get("sliding_window"):
            fields.problem("is_causal=False with a sliding window is not supported; use null")
        values["mask"] = "bidirectional"
    if family == "sdar":
        size = fields.integer("block_size", 1, _LIMITS["max_positions"], default=4)
        values |= {"mask": "block_causal", "block_size": size}
    return values


def _window(fields: Fields) -> int | None:
    """Return the window; Hugging Face's default for a missing key is 4096, null means none."""
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return None
    return fields.integer("sliding_window", 1, _LIMITS["max_positions"], default=4096)


def _layer_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    """Return `sliding_window` and `window_layers` of a Qwen-like model."""
    window = _window(fields) if fields.boolean("use_sliding_window", False) else None
    types = fields.raw.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 0, 1 << 20, default=28)
        marks = tuple(window is not None and i >= first for i in range(num_layers))
    elif not isinstance(types, list) or len(types) != num_layers:
        fields.problem(f"layer_types must be a list of num_hidden_layers={num_layers} names")
        return {}
    else:
        wrong = [name for name in types if name not in ("full_attention", "sliding_attention")]
        if wrong:
            fields.problem(
                f"layer_types has {show(wrong[0])}; use full_attention or sliding_attention"
            )
        marks = tuple(name == "sliding_attention" for name in types)
    if any(marks) and window is None:
        fields.problem("layer_types has sliding_attention, but no sliding_window is in use")
    return {"sliding_window": window if any(marks) else None, "window_layers": marks}


def _llada(fields: Fields) -> dict[str, Any]:
    raw = fields.raw
    for name, value in _LLADA_SWITCHES.items():
        fields.only(name, value, required=name in _LLADA_REQUIRED)
    for name in ("clip_qkv", "rope_scaling", "rope_parameters"):
        if raw.get(name):
            fields.problem(f"{name}={show(raw[name])} is not supported for llada; use null")
    if raw.get("bias_for_layer_norm"):
        fields.problem("bias_for_layer_norm=True is not supported; norms have no bias")
    defaults: dict[str, int | None] = {"num_kv_heads": None, "embedding_size": None}
    if raw.get("mlp_hidden_size") is None and raw.get("mlp_ratio") is not None:
        width = fields.integer("d_model", 1, _LIMITS["hidden_size"])
        defaults["intermediate_size"] = width * fields.integer("mlp_ratio", 1, 64)
    if raw.get("n_kv_heads") is None and raw.get("multi_query_attention"):
        defaults["num_kv_heads"] = 1
    return _sizes(fields, _LLADA_NAMES, defaults) | {
        "norm_eps": fields.number("rms_norm_eps", 1e-5, maximum=1.0),
        "rope": hf_rope.read(fields, 1),
        # The files also carry tie_word_embeddings, true by transformers' default; it is not used.
        "tie_embeddings": fields.boolean("weight_tying", True),
        "qkv_bias": fields.boolean("include_qkv_bias", False),
        "mask": "bidirectional",
    }


def _tokens(config: Fields, generation: Fields) -> SpecialTokens:
    def single(name: str) -> int | None:
        found = config.token(name)
        return generation.token(name) if found is None else found

    stops = config.token_list("eos_token_id") + generation.token_list("eos_token_id")
    return SpecialTokens(
        bos=single("bos_token_id"),
        eos=tuple(dict.fromkeys(stops)),
        pad=single("pad_token_id"),
        mask=single("mask_token_id"),
    )


def canonical(config: ModelConfig) -> ModelConfig:
    """Return the equal model whose redundant fields have their plainest value."""
    marks = config.window_layers
    window = None if marks and not any(marks) else config.sliding_window
    return replace(
        config,
        rope=hf_rope.canonical(config.rope),
        sliding_window=window,
        window_layers=() if window is None or all(marks) else marks,
    )


def to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """Return the content of `config.json`, readable by old and new transformers.

    Another mask than the family's (CDLM students, models adapted from autoregressive ones) goes
    under a key of our own, which other readers ignore. Anything else that the family's file cannot
    express is an error: reading the result back gives `canonical(config)`, always.
    """
    write = _llada_to_hf if config.family == "llada" else _transformers_to_hf
    eos = config.tokens.eos
    raw = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": _MODEL_TYPES[config.family],
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": config.tokens.bos,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": config.tokens.pad,
        **({} if config.tokens.mask is None else {"mask_token_id": config.tokens.mask}),
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        **write(config),
    }
    read = from_hf(raw)
    names = ("mask", "block_size", "shift_logits")
    if changed := {n: getattr(config, n) for n in names if getattr(config, n) != getattr(read, n)}:
        raw[_EXTENSION] = changed
    _check_expressed(config, raw)
    return raw


def _check_expressed(config: ModelConfig, raw: dict[str, Any]) -> None:
    wanted, read = canonical(config), from_hf(raw)
    lost = [name for name in vars(wanted) if getattr(wanted, name) != getattr(read, name)]
    if lost:
        raise ConfigError(
            f"a Hugging Face config of family {config.family!r} cannot express {name}="
            f"{getattr(wanted, name)!r}, it means {getattr(read, name)!r}; choose another family "
            "or change the field"
            for name in lost
        )


def _transformers_to_hf(config: ModelConfig) -> dict[str, Any]:
    raw = {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
        **hf_rope.write(config.rope),
    }
    family = config.family
    if family in ("llama", "qwen3", "sdar"):
        raw["attention_bias"] = config.qkv_bias
    if family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    elif family == "mistral":
        raw["sliding_window"] = config.sliding_window
    elif family in _WINDOWED:
        raw |= _layer_windows_to_hf(config)
    elif family == "dream":
        raw |= {"use_sliding_window": False, "sliding_window": None}
    if family in _CAUSAL and config.mask == "bidirectional" and config.sliding_window is None:
        raw["is_causal"] = False
    if family == "sdar":
        raw["block_size"] = config.block_size
    return raw


def _layer_windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    marks = [window is not None for window in config.layer_windows]
    return {
        "use_sliding_window": any(marks),
        "sliding_window": config.sliding_window if any(marks) else None,
        # Old transformers know only this count of leading full layers; layer_types is exact.
        "max_window_layers": marks.index(True) if any(marks) else config.num_layers,
        "layer_types": ["sliding_attention" if mark else "full_attention" for mark in marks],
    }


def _llada_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **_LLADA_SWITCHES,
        **{theirs: getattr(config, ours) for ours, theirs in _LLADA_NAMES.items()},
        "rope_theta": config.rope.theta,
        "rope_full_precision": True,
        "weight_tying": config.tie_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "include_qkv_bias": config.qkv_bias,
        "flash_attention": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "use_cache": False,
    }
