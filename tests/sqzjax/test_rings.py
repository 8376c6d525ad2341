# SPDX-License-Identifier: Apache-2.0
"""Sliding-window layers take as many new tokens a call as their rings are exact for, no more."""

from functools import cache

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from sqzjax.io import hf
from sqzjax.kvcache import Dense, Mustafar, XQuant, XQuantCL
from sqzjax.models import DecoderLM, Execution
from tests import arrays
from tests.conftest import golden_root
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import CHUNKED, GOLDEN_LOGITS

WINDOW, LENGTH = 6, 48
MODEL = tiny_model(sliding_window=WINDOW)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, LENGTH)).astype(np.int32)
ATOL = CHUNKED["float32"]
_ALL = {"key_sparsity": 0.0, "value_sparsity": 0.0, "group_size": 4}
POLICIES = {  # those that are exact, so that only a lost token can change a logit
    "dense": Dense(),
    "inputs": XQuant(bits=16, form="input", residual_length=0),
    "inputs_residual": XQuant(bits=16, form="input", residual_length=3),
    "groups": Mustafar(**_ALL, residual_length=0),
    "groups_residual": Mustafar(**_ALL, residual_length=6),
}
QUICK = ("dense", "groups_residual")
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n not in QUICK else []) for n in POLICIES]


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch):
    """Numpy arrays are arguments too, which the checks of types in tests do not know."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@cache
def _params():
    return tiny_params(MODEL, scale=1.0)


@cache
def _whole():
    return jax.jit(lambda params: MODEL.forward(params, TOKENS).logits)(_params())


@jax.jit
def _call(params, caches, tokens, start):
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    out = MODEL.forward(params, tokens, positions=positions.astype(jnp.int32), caches=caches)
    return out.caches, out.logits


def _caches(policy, max_new, model=MODEL):
    return model.init_caches(policy, batch=2, capacity=LENGTH, max_new=max_new)


def _ring(caches):
    return caches.policies[0].ring(caches.states[0], WINDOW)


def _check(policy, max_new, sizes):
    """Logits of a text that comes in calls of `sizes` tokens equal those of all at once."""
    caches, found, start = _caches(policy, max_new), [], 0
    for size in sizes:
        tokens = TOKENS[:, start : start + size]
        caches, logits = _call(_params(), caches, tokens, np.int32(start))
        found.append(logits)
        start += size
    np.testing.assert_allclose(np.concatenate(found, 1), _whole()[:, :start], atol=ATOL)


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_exact_up_to_the_limit_and_refused_beyond(name, max_new=2):
    policy = POLICIES[name]
    ring = _ring(_caches(policy, max_new))
    assert ring.most > max_new
    _check(policy, max_new, (1, ring.most, 1, 1, ring.most, 1, ring.most))
    _check(policy, max_new, (ring.most,) * (LENGTH // ring.most))
    with pytest.raises(ValueError, match=f"{ring.most + 1} new tokens at once exceed"):
        _check(policy, max_new, (1, ring.most + 1))


def test_the_limit_of_plain_rings_is_no_lower_than_it_must_be(monkeypatch):
    monkeypatch.setattr("sqzjax.models.decoder.check_new", lambda *_: None)
    for name in ("dense", "inputs_residual"):
        most = _ring(_caches(POLICIES[name], 2)).most
        with pytest.raises(AssertionError, match="Not equal"):
            _check(POLICIES[name], 2, (most,) * 2 + (most + 1,) * 2)


def _first(params, caches, width, positions):
    return MODEL.forward(params, TOKENS[:, :width], positions=positions, caches=caches).logits


@pytest.mark.parametrize("name", NAMES)
def test_first_tokens_that_fit_are_taken_where_positions_are_known(name):
    caches = _caches(POLICIES[name], 1)
    width = _ring(caches).first
    here = np.broadcast_to(np.arange(width + 1, dtype=np.int32), (2, width + 1))
    for positions in (None, here[:, :width]):
        run = jax.jit(lambda p, c, known=positions: _first(p, c, width, known))
        np.testing.assert_allclose(run(_params(), caches), _whole()[:, :width], atol=ATOL)
    message = f"create the caches with max_new={width + 1}"
    for positions in (None, here, jnp.asarray(here)):
        with pytest.raises(ValueError, match=message):
            _first(_params(), caches, width + 1, positions)
    with pytest.raises(ValueError, match="exceed"):
        jax.jit(lambda p, c, traced: _first(p, c, width, traced))(
            _params(), caches, here[:, :width]
        )


def test_padding_is_no_token_and_other_calls_have_no_limit():
    caches, params = _caches(Dense(), 1), _params()
    positions = np.full((2, 20), -1, np.int32)
    positions[:, 3:5] = [30, 31]
    jax.eval_shape(
        lambda: MODEL.forward(params, TOKENS[:, :20], positions=positions, caches=caches)
    )
    seen = {"caches": caches, "update_cache": False, "logits": "none"}
    jax.eval_shape(lambda: MODEL.forward(params, TOKENS[:, :40], **seen))
    for policy, max_new in ((XQuantCL(), 1), (Dense(), LENGTH)):
        plain = _caches(policy, max_new)
        assert plain.policies[-1].ring(plain.states[-1], WINDOW) is None


def test_stacked_rings_have_the_same_limit():
    stacked = DecoderLM(MODEL.config, Execution())
    caches, tokens = _caches(Dense(), 2, stacked), TOKENS[:, :9]
    positions = np.broadcast_to(np.arange(20, 29, dtype=np.int32), (2, 9))
    params = stacked.abstract_params()
    for count in (3, 4):

        def run(params, count=count):
            given = {"positions": positions[:, :count], "caches": caches}
            return stacked.forward(params, tokens[:, :count], **given).logits

        if count == 3:
            jax.eval_shape(run, params)
        else:
            with pytest.raises(ValueError, match="4 new tokens at once exceed the 3"):
                jax.eval_shape(run, params)


@pytest.mark.parametrize("max_new", [1, 4, 8, 16])
def test_a_checkpoint_fed_16_tokens_a_call_is_refused_or_exact(max_new):
    folder = golden_root() / "mistral_window"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: reference checkpoints are not part of the project")
    execution = Execution(scan_layers=False)
    config, params = hf.load(folder, execution=execution)
    model, expected = DecoderLM(config, execution), arrays.load(folder / "expected.npz")
    tokens = np.asarray(expected["input_ids"], np.int32)
    batch, length = tokens.shape
    caches = model.init_caches(Dense(), batch=batch, capacity=length, max_new=max_new)
    step = jax.jit(lambda t, p, c: model.forward(params, t, positions=p, caches=c)[::2])
    for start in range(0, length, 16):
        end = min(start + 16, length)
        positions = np.broadcast_to(np.arange(start, end, dtype=np.int32), (batch, end - start))
        if max_new < 15:
            with pytest.raises(ValueError, match=f"{end - start} new tokens at once exceed"):
                step(tokens[:, start:end], positions, caches)
            return
        logits, caches = step(tokens[:, start:end], positions, caches)
        np.testing.assert_allclose(
            logits, expected["logits"][:, start:end], atol=GOLDEN_LOGITS, rtol=GOLDEN_LOGITS
        )
