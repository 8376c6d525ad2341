# SPDX-License-Identifier: Apache-2.0
"""config.json from strangers: absurd, contradictory and unsupported values; no code is ever run."""

import ast
import json
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import hf
from sqzjax.io.hf_config import from_hf
from sqzjax.models.config import ModelConfig
from tests.sqzjax.test_hf_config import BODY, LLADA

SIZE_NAMES = [name for name in BODY if name not in ("rms_norm_eps", "hidden_act")]
SECONDS = 1.0
EXTRA_BYTES = 100_000_000


def problems(raw, generation=None):
    begin = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError) as caught:
            from_hf(raw, generation)
        assert tracemalloc.get_traced_memory()[1] < EXTRA_BYTES
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < SECONDS
    assert len(str(caught.value)) < 5000
    return caught.value.problems


def llama(**changes):
    return {"model_type": "llama", **BODY, **changes}


@pytest.mark.parametrize("name", SIZE_NAMES)
@pytest.mark.parametrize(
    "value",
    [1 << 40, 10**5000, -1, 0, 3.0, "64", True, [64], {}, float("nan"), float("inf")],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) else f"int{value % 97}",
)
def test_absurd_size_is_named(name, value):
    assert any(problem.startswith(name) for problem in problems(llama(**{name: value})))


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_size_is_named(name):
    raw = llama()
    del raw[name]
    assert problems(raw) == (f"{name} is missing",)


def test_every_problem_is_listed_at_once():
    raw = llama(
        num_hidden_layers=1 << 40,
        hidden_size=-64,
        vocab_size=1 << 60,
        num_attention_heads=4.5,
        hidden_act="gelu",
        rms_norm_eps=0,
        attention_bias="yes",
        eos_token_id=[1, "2"],
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )
    del raw["intermediate_size"]
    found = "\n".join(problems(raw))
    for name in (*raw.keys() - {"model_type", "rope_scaling"} - BODY.keys(), "intermediate_size"):
        assert name in found
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "dynamic",
    ):
        assert name in found


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", None, 3, ["llama"], "", "llama2"])
def test_unknown_model_type_lists_the_supported_ones(model_type):
    (problem,) = problems(llama(model_type=model_type))
    assert "llama, mistral, qwen2, qwen3, llada, Dream, sdar" in problem


def test_what_releases_of_transformers_read_differently_is_refused():
    original = "original_max_position_embeddings"
    yarn = {"type": "yarn", "factor": 4.0, original: 32}
    (problem,) = problems(llama(rope_scaling=yarn, **{original: 64}))
    assert "different values in one file: [64, 32]" in problem
    (problem,) = problems(llama(model_type="mistral", is_causal=False, sliding_window=16))
    assert "is_causal=False with a sliding window" in problem


UNSUPPORTED = [
    ("is_causal", "no"),
    ("hidden_act", "gelu"),
    ("partial_rotary_factor", 0.5),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
    ("rope_scaling", {"type": "mrope", "mrope_section": [1, 2]}),
    ("rope_scaling", {"rope_type": "default", "mrope_section": [1, 2]}),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": -1.0}),
    ("rope_scaling", {"type": "linear", "factor": "2"}),
    ("rope_scaling", {"type": "linear", "factor": float("inf")}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"rope_type": ["linear"], "factor": 8.0}),
    ("rope_scaling", "linear"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ("rope_theta", 0),
    ("rope_theta", 1.0),
    (
        "rope_scaling",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    ("rope_theta", "1e4"),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", "1e-6"),
    ("attention_bias", 1),
    ("tie_word_embeddings", "false"),
    ("eos_token_id", 199),
    ("eos_token_id", -1),
    ("eos_token_id", 2.0),
    ("bos_token_id", 1 << 40),
    ("pad_token_id", True),
    ("quantization_config", {"quant_method": "gptq"}),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
]


@pytest.mark.parametrize("name, value", UNSUPPORTED)
def test_unsupported_value_is_refused(name, value):
    assert problems(llama(**{name: value}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "x" * 10**6},
        {"hidden_act": ["x"] * 10**5},
        {"rope_scaling": {"type": "x" * 10**6}},
        {"rope_scaling": {"x" * 10**6: 1}},
        {"vocab_size": "9" * 10**6},
        {"eos_token_id": [-1] * 10**6},
    ],
)
def test_long_value_does_not_flood_the_message(changes):
    assert problems(llama(**changes))


def test_contradicting_rope_spellings_are_refused():
    linear = {"type": "linear", "factor": 2.0}
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert "disagree" in problems(llama(rope_scaling=linear, rope_parameters=new))[0]
    new = {"rope_type": "default", "rope_theta": 5e5}
    assert "rope_theta" in problems(llama(rope_theta=1e4, rope_parameters=new))[0]


WINDOWS = [
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": "full_attention"},
    {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
    {"layer_types": ["sliding_attention"] * 3},
    {"use_sliding_window": True, "sliding_window": 0},
    {"use_sliding_window": 1},
    {
        "use_sliding_window": True,
        "sliding_window": None,
        "max_window_layers": 0,
        "layer_types": [[]],
    },
]


@pytest.mark.parametrize("changes", WINDOWS)
def test_wrong_windows_are_refused(changes):
    assert problems(llama(model_type="qwen2", **changes))


def test_dream_refuses_windows_and_sdar_bad_blocks():
    assert problems(llama(model_type="Dream", use_sliding_window=True))
    for size in (0, -4, 2.5, "4"):
        assert "block_size" in problems(llama(model_type="sdar", block_size=size))[0]


LLADA_UNSUPPORTED = [
    ("block_type", "sequential"),
    ("block_type", None),
    ("layer_norm_type", "default"),
    ("activation_type", "swiglu"),
    ("activation_type", "gelu"),
    ("rope", False),
    ("alibi", True),
    ("attention_layer_norm", True),
    ("scale_logits", True),
    ("input_emb_norm", True),
    ("include_bias", True),
    ("bias_for_layer_norm", True),
    ("layer_norm_with_affine", False),
    ("block_group_size", 2),
    ("clip_qkv", 8.0),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("embedding_size", 100),
    ("weight_tying", "no"),
    ("n_layers", 1 << 40),
    ("mlp_ratio", -1),
]


@pytest.mark.parametrize("name, value", LLADA_UNSUPPORTED)
def test_llada_switch_is_refused(name, value):
    raw = LLADA | {name: value}
    if name == "mlp_ratio":
        del raw["mlp_hidden_size"]
    assert name in "\n".join(problems(raw))


@pytest.mark.parametrize("name", ["block_type", "layer_norm_type", "activation_type", "rope"])
def test_llada_switch_with_another_default_must_be_present(name):
    raw = {key: value for key, value in LLADA.items() if key != name}
    assert name in "\n".join(problems(raw))


def test_wrong_generation_config_is_named():
    found = problems(llama(), {"eos_token_id": "2", "pad_token_id": [0]})
    assert all(problem.startswith("generation_config.") for problem in found)
    assert len(found) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
NAMES = sorted({*BODY, *LLADA, "rope_scaling", "rope_parameters", "rope_theta", "layer_types"})
NAMES += ["eos_token_id", "sliding_window", "use_sliding_window", "max_window_layers", "head_dim"]
NAMES += ["block_size", "embedding_size", "mlp_ratio", "n_kv_heads", "quantization_config"]
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "beta_fast", "truncate"]),
    JSON | st.sampled_from(["linear", "yarn", "llama3", "default"]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "llada", "Dream", "sdar"]),
    st.dictionaries(st.sampled_from(NAMES), JSON | ROPE, max_size=4),
    st.dictionaries(st.sampled_from(["eos_token_id", "pad_token_id"]), JSON),
)
def test_any_values_give_a_config_or_a_config_error(model_type, changes, generation):
    raw = BODY | LLADA | changes | {"model_type": model_type}
    begin = time.process_time()
    try:
        assert isinstance(from_hf(raw, generation), ModelConfig)
    except ConfigError as error:
        assert error.problems
    assert time.process_time() - begin < SECONDS


FILES = {
    "absent": None,
    "empty": b"",
    "list": b"[]",
    "broken": b'{"model_type": "llama",',
    "duplicate key": b'{"model_type": "gpt2", "model_type": "llama"}',
    "1 MB of nesting": b'{"a":' + b"[" * (1 << 20),
    "invalid utf-8": b'{"model_type": "\xff"}',
    "number of 5000 digits": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_damaged_file_is_named(tmp_path, data):
    if data is not None:
        (tmp_path / "config.json").write_bytes(data)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hf.read_config(tmp_path)
    assert time.process_time() - begin < SECONDS


def test_problems_name_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama(num_hidden_layers=-1)))
    with pytest.raises(ConfigError, match=r"config\.json: num_hidden_layers=-1"):
        hf.read_config(tmp_path)


# No code from files: checked in the sources themselves.

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile"}


def code_runners(tree):
    """Yield (line, what) of everything that could run code found in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_MODULES:
                    yield node.lineno, f"import of {name}"
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                yield node.lineno, f"call of {node.func.id}"
            for keyword in node.keywords:
                safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not safe:
                    yield node.lineno, f"{keyword.arg} is not False"


@pytest.mark.parametrize("package", ["sqzjax", "pallas_kernels", "train", "eval"])
def test_no_source_runs_code_from_files(package):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, what in code_runners(ast.parse(path.read_text()))
    ]
    assert not found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import load", "eval('1')", "exec(x)"]
    + ["np.load(f, allow_pickle=True)", "from_pretrained(p, trust_remote_code=flag)"],
)
def test_the_source_check_can_fail(source):
    assert list(code_runners(ast.parse(source)))
