# SPDX-License-Identifier: Apache-2.0
"""ModelConfig to config.json and back: any model survives, or is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.attention.rope import frequencies
from sqzjax.errors import ConfigError
from sqzjax.io.hf_config import canonical, from_hf, to_hf
from sqzjax.models.config import FAMILIES, ModelConfig, RopeConfig, SpecialTokens
from tests.sqzjax.test_hf_config import body


def _rope(draw) -> dict:
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    scale = st.floats(1.0, 64.0)
    values = {"theta": draw(st.floats(1e3, 1e7)), "kind": kind}
    if kind != "default":
        values["factor"] = draw(scale)
    if kind in ("llama3", "yarn"):
        values["original_max_positions"] = draw(st.integers(1, 1 << 20))
    if kind == "llama3":
        low = draw(scale)
        values |= {"low_freq_factor": low, "high_freq_factor": low + draw(scale)}
    if kind == "yarn":
        values |= {
            "beta_fast": draw(scale),
            "beta_slow": draw(scale),
            "truncate": draw(st.booleans()),
        }
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            values[name] = draw(st.none() | scale)
    return values


def _family_values(draw, family, layers):
    values = {}
    flag = draw(st.booleans())
    if family in ("llama", "qwen3", "sdar"):
        values |= {"qkv_bias": flag, "out_bias": flag}
    if family == "llama":
        values["mlp_bias"] = draw(st.booleans())
    if family == "llada":
        values["qkv_bias"] = flag
    if family in ("qwen2", "dream"):
        values["qkv_bias"] = True
    if family in ("qwen3", "sdar"):
        values["qk_norm"] = True
    if family in ("mistral", "qwen2", "qwen3", "sdar"):
        values["sliding_window"] = draw(st.none() | st.integers(1, 100_000))
        if family != "mistral" and values["sliding_window"]:
            marks = st.lists(st.booleans(), min_size=layers, max_size=layers)
            values["window_layers"] = tuple(draw(marks))
    if family in ("llada", "dream"):
        values["mask"] = "bidirectional"
    if family == "dream":
        values["shift_logits"] = True
    if family == "sdar":
        values |= {"mask": "block_causal", "block_size": draw(st.integers(1, 64))}
    return values


@st.composite
def config_values(draw):
    """Draw keyword arguments; `build` makes them a config, outside the strategy.

    Constructors are checked by beartype in tests, and it uses `random`, which hypothesis forbids
    inside strategies.
    """
    family = draw(st.sampled_from(FAMILIES))
    kv_heads, groups, layers = (draw(st.integers(1, n)) for n in (8, 8, 12))
    head_dim = 2 * draw(st.integers(1, 64))
    llada = family == "llada"
    hidden = kv_heads * groups * head_dim if llada else draw(st.integers(1, 8192))
    vocab = draw(st.integers(1, 200_000))
    embedding = vocab + draw(st.integers(0, 300)) if llada else vocab
    token = st.none() | st.integers(0, embedding - 1)
    eos = draw(st.lists(st.integers(0, embedding - 1), max_size=3, unique=True))
    tokens = {"bos": draw(token), "eos": tuple(eos), "pad": draw(token), "mask": draw(token)}
    rope = {"theta": draw(st.floats(1e3, 1e7))} if llada else _rope(draw)
    return dict(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 30_000)),
        num_layers=layers,
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        embedding_size=embedding,
        max_positions=draw(st.integers(1, 1 << 20)),
        norm_eps=draw(st.floats(1e-8, 1e-3)),
        rope=rope,
        tie_embeddings=draw(st.booleans()),
        tokens=tokens,
        **_family_values(draw, family, layers),
    )


def build(values) -> ModelConfig:
    rope, tokens = RopeConfig(**values["rope"]), SpecialTokens(**values["tokens"])
    return ModelConfig(**{**values, "rope": rope, "tokens": tokens})


@settings(max_examples=100, deadline=None)
@given(config_values(), st.sampled_from(["float32", "bfloat16"]))
def test_round_trip(values, dtype):
    config = build(values)
    raw = json.loads(json.dumps(to_hf(config, dtype=dtype)))
    again = from_hf(raw)
    assert again == canonical(config)
    # What canonical form drops has no effect: same windows, same frequencies.
    assert again.layer_windows == config.layer_windows
    for one, other in zip(frequencies(again.rope, 8), frequencies(config.rope, 8)):
        np.testing.assert_array_equal(one, other)
    assert raw["torch_dtype"] == raw["dtype"] == dtype
    assert isinstance(raw["architectures"], list)


@settings(max_examples=100, deadline=None)
@given(config_values())
def test_old_and_new_transformers_see_the_same_model(values):
    """Either spelling of the rotary embedding, read alone, gives the model that was written."""
    config = build(values)
    raw = to_hf(config)
    if config.family == "llada":
        return
    old = {name: value for name, value in raw.items() if name != "rope_parameters"}
    new = {n: v for n, v in raw.items() if n not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert from_hf(old) == from_hf(new) == canonical(config)


INEXPRESSIBLE = [
    ("llama", {"qk_norm": True}),
    ("llama", {"out_bias": True}),
    ("llama", {"sliding_window": 5}),
    ("llama", {"embedding_size": 256}),
    ("mistral", {"out_bias": True, "qkv_bias": True}),
    ("mistral", {"sliding_window": 5, "window_layers": (True, False, True)}),
    ("qwen2", {"qkv_bias": False}),
    ("llada", {"mask": "bidirectional", "head_dim": 32}),
    ("llama", {"rope": RopeConfig(kind="linear", factor=2.0, attention_factor=2.0)}),
    ("llada", {"mask": "bidirectional", "rope": RopeConfig(kind="linear", factor=2.0)}),
]


@pytest.mark.parametrize("family, changes", INEXPRESSIBLE)
def test_what_the_file_cannot_say_is_not_exported(family, changes):
    with pytest.raises(ConfigError, match=list(changes)[-1]):
        to_hf(body(family, **changes))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llada", {"mask": "block_causal", "block_size": 32}),
        (
            "dream",
            {"mask": "block_causal", "block_size": 8, "shift_logits": True, "qkv_bias": True},
        ),
        (
            "qwen2",
            {"mask": "block_causal", "block_size": 32, "shift_logits": True, "qkv_bias": True},
        ),
        ("llama", {"mask": "bidirectional", "shift_logits": True}),
    ],
)
def test_a_converted_model_keeps_its_mask_under_a_key_of_its_own(family, changes):
    config = body(family, **changes)
    raw = to_hf(config)
    assert from_hf(json.loads(json.dumps(raw))) == canonical(config)
    assert set(raw["sqzjax"]) <= {"mask", "block_size", "shift_logits"}
    with pytest.raises(ConfigError, match="sqzjax="):
        from_hf({**raw, "sqzjax": {"mask": 3}})
    with pytest.raises(ConfigError, match="sqzjax="):
        from_hf({**raw, "sqzjax": {"vocab_size": 3}})


def test_a_bidirectional_model_is_one_to_transformers_too():
    raw = to_hf(body("llama", mask="bidirectional"))
    assert raw["is_causal"] is False and "sqzjax" not in raw


def test_unused_rope_fields_do_not_prevent_export():
    config = body("llama", rope=RopeConfig(original_max_positions=512, beta_fast=7.0))
    assert from_hf(to_hf(config)) == replace(config, rope=RopeConfig())
