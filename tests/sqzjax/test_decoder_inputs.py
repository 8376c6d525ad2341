# SPDX-License-Identifier: Apache-2.0
"""Calls of the decoder with arguments that do not fit are refused before anything runs."""

import jax
import jaxtyping
import numpy as np
import pytest

from sqzjax.kvcache import Dense
from sqzjax.models import DecoderLM, Execution
from tests.contracts.decoders import tiny_model

WIDTH = 32
TOKENS = np.zeros((2, 5), np.int32)
CALLS = {
    "logits_of_return_hidden": ({"logits": "last"}, "logits='last' must be 'all', 'none' or an ar"),
    "logits_of_one_row": (
        {"logits": np.zeros(1, np.int32)},
        r"logits=an array of shape \[1\] must be .* 2 row indices",
    ),
    "hidden_misspelt": (
        {"return_hidden": "lst"},
        "return_hidden='lst' must be one of none, last, all",
    ),
    "flat_tokens": (
        {"tokens": np.zeros(5, np.int32)},
        r"tokens are of shape \[5\] and must be \[batch, length\]",
    ),
    "flat_positions": (
        {"positions": np.arange(5, dtype=np.int32)},
        r"positions are of shape \[5\] and must be \[2, 5\]",
    ),
    "positions_of_one_row": (
        {"positions": np.zeros((1, 5), np.int32)},
        r"positions are of shape \[1, 5\] and must be \[2, 5\]",
    ),
    "segments_too_short": (
        {"segment_ids": np.zeros((2, 4), np.int32)},
        r"segment_ids are of shape \[2, 4\] and must be \[2, 5\]",
    ),
    "flat_embeds": (
        {"tokens": None, "embeds": np.zeros((5, WIDTH), np.float32)},
        r"embeds are of shape \[5, 32\] and must be \[batch, length, 32\]",
    ),
    "embeds_too_narrow": (
        {"tokens": None, "embeds": np.zeros((2, 5, 16), np.float32)},
        r"embeds are of shape \[2, 5, 16\] and must be \[batch, length, 32\]",
    ),
}


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch):
    """Without the checks of types that come first in tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_do_not_fit_are_refused_by_name(name):
    arguments, message = CALLS[name]
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model.forward({}, **({"tokens": TOKENS} | arguments))


@pytest.mark.parametrize("scan", [False, True])
def test_caches_of_another_batch_are_refused(scan):
    model = DecoderLM(tiny_model().config, Execution(scan_layers=scan))
    caches = model.init_caches(Dense(), batch=3, capacity=8, max_new=8)
    with pytest.raises(ValueError, match=r"2 sequences were given and the caches hold 3; .*reord"):
        model.forward({}, TOKENS, caches=caches)


def test_arguments_that_fit_are_taken():
    model = tiny_model()
    params = model.abstract_params()
    for logits, rows in (("all", 5), (np.zeros(2, np.int32), 1), ("none", None)):
        for hidden in ("none", "last", "all"):

            def run(params, logits=logits, hidden=hidden):
                return model.forward(params, TOKENS, logits=logits, return_hidden=hidden)

            out = jax.eval_shape(run, params)
            assert (out.logits is None) == (rows is None)
            assert rows is None or out.logits.shape[1] == rows
            assert (out.hidden is None) == (hidden == "none")
