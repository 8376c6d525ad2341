# SPDX-License-Identifier: Apache-2.0
"""Settings that no cache or quantizer can have are refused where it is made, and in dry runs."""

import dataclasses
import math

import jax.numpy as jnp
import jaxtyping
import pytest

from sqzjax import config
from sqzjax.errors import ConfigError
from sqzjax.kvcache import (
    ALISA,
    GEAR,
    H2O,
    KIVI,
    CacheConfig,
    Dense,
    KVQuant,
    LoSA,
    Mustafar,
    Quantized,
    Quest,
    Scissorhands,
    StreamingLLM,
    XQuant,
    XQuantCL,
)
from sqzjax.kvcache.similar import Similar
from sqzjax.quant import Codebook, Float8, NormalFloat, Uniform

NAN = math.nan
BUDGETS = (-1, 0, NAN, math.inf, 8.5)
RESIDUAL = {"residual_length": (-1, NAN, 1.5)}
CODED = RESIDUAL | {"sinks": (-1, NAN)}
GROUPED = RESIDUAL | {"bits": (0, -2, 5, 4.0, NAN), "group_size": (-1, 0, NAN, 1.5)}
PAGED = {
    "budget": (-16, 0, 40, NAN, 32.0),
    "page_size": (0, -1, NAN),
    "dense_layers": (-1, NAN),
    "dtype": ("int3", "int8", "float64"),
}

BAD = {
    Dense: {"dtype": ("int3", "int8", "float8_e4m3fn", "float64")},
    Similar: {"share": (0.0, -1.0, 1.5, NAN)},
    KIVI: GROUPED | {"rope": ("none",)},
    Quantized: CODED | {"rope": ("none",), "key": ("int4", Codebook(axis="channel"))},
    KVQuant: CODED | {"bits": (0, 5, NAN), "outliers": (-0.1, NAN), "rope": ("none",)},
    GEAR: GROUPED
    | {
        "rank": (0, NAN),
        "loops": (0, NAN),
        "sparsity": (-0.1, 1.0, NAN),
        "backbone": ("none",),
    },
    Mustafar: CODED
    | {"key_sparsity": (-0.1, NAN), "value_sparsity": (1.0, NAN), "group_size": (0, NAN)},
    XQuant: GROUPED
    | CODED
    | {"first_bits": (1, NAN), "first_layers": (-1, NAN), "shards": (0, NAN), "form": ("none",)},
    XQuantCL: GROUPED
    | CODED
    | {
        "first_bits": (1, NAN),
        "first_layers": (0, NAN),
        "form": ("none",),
        "accumulator": ("int8",),
    },
    H2O: {"budget": BUDGETS, "recent": (-0.1, 1.0, NAN)},
    Scissorhands: {
        "budget": (*BUDGETS, 8),  # no more than the newest 10, which never leave
        "recent": (0, NAN),
        "drop": (0.0, NAN),
        "history": (0, 33, NAN, 32.0),
    },
    ALISA: {"budget": BUDGETS, "local": (0.0, NAN)},
    StreamingLLM: {
        "budget": (*BUDGETS, 4),  # no more than the four sinks
        "sinks": (-1, NAN),
        "positions": ("none",),
    },
    Quest: PAGED,
    LoSA: PAGED | {"active_tokens": (-1, NAN), "block_size": (0, NAN), "reference": ("none",)},
    Uniform: {"bits": (0, 5, -4, 4.0, NAN), "group_size": (-1, NAN, 2.0), "axis": ("row",)},
    NormalFloat: {"bits": (1, 5, NAN), "group_size": (-1, NAN), "axis": ("row",)},
    Codebook: {"bits": (0, 5, NAN), "outliers": (-0.1, 1.5, NAN), "axis": ("row",)},
    Float8: {"format": ("e3m4",)},
}


@pytest.fixture
def as_users_run(monkeypatch):
    """Without the checks of types that come first in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("policy", BAD, ids=lambda policy: policy.__name__)
def test_settings_that_cannot_be_are_refused_by_name(policy):
    for name, values in BAD[policy].items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name}.* must|{name}.* leave"):
                policy(**{name: value})


def test_every_setting_of_every_policy_is_checked():
    for policy, bad in BAD.items():
        fields = {field.name: field.type for field in dataclasses.fields(policy)}
        free = {"kind", "value", "dense", "calibration"}  # what `key` stands for, text, a cache
        flags = {name for name, kind in fields.items() if kind is bool}
        assert set(bad) == set(fields) - free - flags


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "kivi", "bits": 5},
        {"kind": "h2o", "budget": -1},
        {"kind": "dense", "dtype": "int3"},
        {"kind": "quantized", "key": {"kind": "codebook", "axis": "channel"}},
        {"kind": "streaming_llm", "budget": 4},
    ],
    ids=lambda section: section["kind"],
)
def test_configurations_are_refused_when_they_are_read(section):
    with pytest.raises(ConfigError, match=r"must|window"):
        config.load(CacheConfig, section)


@pytest.mark.parametrize("number", [32, 32.0, 1, 0.5])
def test_budgets_are_tokens_or_shares(number):
    assert H2O(budget=number).budget == StreamingLLM(budget=number).budget == number


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize(
    ("quantizer", "shape", "message"),
    [
        (Uniform(group_size=8), (4, 172), "group_size=8 must divide the 172 channels"),
        (NormalFloat(group_size=8), (4, 172), "group_size=8 must divide the 172 channels"),
        (Codebook(), (1, 65537), "65537 channels must be at most"),
        (Uniform(axis="channel", group_size=8), (12, 16), r"\[12, 16\] .* multiple of 8"),
        (NormalFloat(axis="channel", group_size=8), (12, 16), "multiple of 8"),
        (Float8(), (16,), "rows and columns"),
        (Uniform(), (16,), "rows and columns"),
    ],
    ids=str,
)
def test_tensors_that_cannot_be_coded_are_refused(quantizer, shape, message):
    with pytest.raises(ValueError, match=message):
        quantizer.encode(jnp.zeros(shape))
