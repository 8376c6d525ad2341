# SPDX-License-Identifier: Apache-2.0
"""Passes that run only the tokens whose values changed most, against a float64 definition."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import kvcache
from sqzjax.decode.commit import Threshold
from sqzjax.decode.reuse import Periodic
from sqzjax.kvcache import Dense, StreamingLLM
from sqzjax.kvcache.similar import Similar
from tests.sqzjax.diffusion_reference import PROMPTS, decode, model_of
from tests.tolerances import GOLDEN_HIDDEN

LENGTH = 20


class Layers:
    """The two-layer model by its definition, in float64, of one sequence."""

    def __init__(self, model, params):
        self.config = model.config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        count, width = model.config.num_layers, model.config.hidden_size
        shape = (count, LENGTH, model.config.num_kv_heads, model.config.head_dim)
        self.k, self.v = np.zeros(shape), np.zeros(shape)
        self.added = np.zeros((2, count, LENGTH, width))

    def _norm(self, x, name, layer):
        scale = self.params[layer][name]["scale"] if layer else self.params[name]["scale"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.norm_eps) * scale

    def _heads(self, x, layer, name):
        out = x @ self.params[layer]["attn"][name]["kernel"]
        return out.reshape(len(x), -1, self.config.head_dim)

    def _rotate(self, x, positions):
        half = self.config.head_dim // 2
        angle = positions[:, None] * self.config.rope.theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def run(self, ids, window, share):
        """Return the final hidden states of the positions `window`; `share` of them run."""
        chosen_of = []
        x = self.params["embed"]["embedding"][ids[window]]
        for index in range(self.config.num_layers):
            layer = f"layers_{index}"
            normed = self._norm(x, "attn_norm", layer)
            fresh = self._heads(normed, layer, "v")
            a, b = (v.reshape(len(window), -1) for v in (fresh, self.v[index, window]))
            norms = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-20)
            order = np.argsort((a * b).sum(1) / norms, kind="stable")
            rows = order[: math.ceil(share * len(window))]
            at = window[rows]
            chosen_of.append(set(at.tolist()))
            self.v[index, at] = fresh[rows]
            self.k[index, at] = self._rotate(self._heads(normed[rows], layer, "k"), at)
            q = self._rotate(self._heads(normed[rows], layer, "q"), at)
            group = q.shape[1] // self.k.shape[2]
            k, v = (np.repeat(c[index], group, axis=1) for c in (self.k, self.v))
            score = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            out = np.einsum("nts,snh->tnh", weight, v).reshape(len(rows), -1)
            self.added[0, index, at] = out @ self.params[layer]["attn"]["o"]["kernel"]
            x = x + self.added[0, index, window]
            mlp = {k: w["kernel"] for k, w in self.params[layer]["mlp"].items()}
            y = self._norm(x[rows], "mlp_norm", layer)
            gate = y @ mlp["gate"]
            self.added[1, index, at] = (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"]
            x = x + self.added[1, index, window]
        return self._norm(x, "final_norm", None), chosen_of


def passes(model, params, ids, windows, shares):
    """Return the hidden states of passes over rows of `ids`, each a pair of rows and positions."""
    caches = model.init_caches(Similar(), batch=len(ids[0]), capacity=LENGTH, max_new=LENGTH)

    def step(caches, ids, positions):
        at = jnp.take_along_axis(ids, jnp.maximum(positions, 0), axis=1)
        out = model.forward(
            params, at, positions=positions, caches=caches, logits="none", return_hidden="last"
        )
        return out.hidden, out.caches

    found, run = [], jax.jit(step)
    for tokens, window, share in zip(ids, windows, shares, strict=True):
        policies = tuple(replace(policy, share=share) for policy in caches.policies)
        hidden, caches = run(replace(caches, policies=policies), tokens, window)
        found.append(np.asarray(hidden))
    return found, caches


def test_passes_equal_their_definition():
    """Two sequences of which the second's answer is shorter; each runs a share of its own.

    First two tokens change, and as many run; then all do, since equal values would tie.
    """
    model, params = model_of("bidirectional")
    rng = np.random.default_rng(0)
    first = rng.integers(1, 50, (2, LENGTH)).astype(np.int32)
    changed, again = first.copy(), first.copy()
    changed[:, [7, 11]] = [[3, 4], [5, 6]]
    again[:, 6:16] = (changed[:, 6:16] + 7) % 50
    whole = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    window = np.array([np.arange(6, 16), [*range(6, 13), -1, -1, -1]], np.int32)
    shares = (1.0, 0.2, 0.4, 1.0)  # of 10 tokens 4, of 7 only 3
    found, _ = passes(model, params, (first, changed, again, again), (whole, *[window] * 3), shares)
    for row in range(2):
        layers = Layers(model, params)
        own = window[row][window[row] >= 0]
        chosen = None
        for number, (ids, places, share) in enumerate(
            zip((first, changed, again, again), (whole[row], own, own, own), shares, strict=True)
        ):
            expected, chosen = layers.run(ids[row], places, share)
            got = found[number][row, : len(places)]
            np.testing.assert_allclose(got, expected, atol=GOLDEN_HIDDEN, err_msg=f"{number}")
            if number == 1:
                assert chosen[0] == {7, 11}, "tokens that changed have other values"


def test_a_share_costs_less_and_the_state_is_reported():
    """Of 20 tokens 5 run: a quarter of attention and feed-forward, and all value projections."""
    model, params = model_of("bidirectional")
    ids = jnp.ones((1, LENGTH), jnp.int32)

    def flops(share):
        caches = model.init_caches(Similar(share=share), batch=1, capacity=LENGTH, max_new=LENGTH)
        step = jax.jit(
            lambda c: model.forward(params, ids, caches=c, logits="none", return_hidden="last")
        )
        return step.lower(caches).compile().cost_analysis()["flops"]

    assert flops(0.25) < 0.45 * flops(1.0)
    caches = model.init_caches(Similar(), batch=1, capacity=LENGTH, max_new=LENGTH)
    dense = model.init_caches(Dense(), batch=1, capacity=LENGTH, max_new=LENGTH)
    more = 2 * LENGTH * model.config.hidden_size * 4 * model.config.num_layers
    assert kvcache.nbytes(caches) == kvcache.nbytes(dense) + more


@pytest.mark.slow
def test_decoding_with_nearly_all_tokens_equals_refreshing_the_answer():
    options = {"commit": Threshold(threshold=0.2), "count": 14}
    every = decode("bidirectional", PROMPTS, reuse=Periodic(prompt=6, response=1), **options)
    reuse = Periodic(prompt=6, response=100, share=0.999)
    share = decode("bidirectional", PROMPTS, reuse=reuse, **options)
    np.testing.assert_array_equal(every.tokens, share.tokens)
    assert share.stats.cache_bytes > every.stats.cache_bytes


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"share=1\.0 must lie in \[0, 1\)"):
        Periodic(share=1.0)
    with pytest.raises(ValueError, match=r"share=0\.0 must lie in \(0, 1\]"):
        Similar(share=0.0)
    cache = StreamingLLM()
    with pytest.raises(ValueError, match=r"needs the dense cache, not 'streaming_llm'"):
        decode("bidirectional", PROMPTS, reuse=Periodic(share=0.25), cache=cache)
