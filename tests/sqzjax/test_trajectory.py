# SPDX-License-Identifier: Apache-2.0
"""Teacher trajectories against a step-by-step reference on the host, and against the decoder."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.decode import Diffusion, Generator, SamplingConfig
from sqzjax.decode.trajectory import collect, response_lengths, visible
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params
from tests.tolerances import GOLDEN_HIDDEN

MASK, LENGTH, BLOCK, WIDTH = 60, 12, 4, 24
TOKENS = SpecialTokens(eos=(7,), mask=MASK)


def teacher(**fields):
    return tiny_model(mask="bidirectional", family="llada", tokens=TOKENS, **fields)


def ragged(lengths=(5, 8, 3), seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), 9), np.int32)
    for row, size in enumerate(lengths):
        tokens[row, :size] = rng.integers(0, 50, size)
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


@cache
def passes(model):
    def run(params, ids, positions):
        return model.forward(params, ids[None], positions=positions[None], return_hidden="last")

    return jax.jit(run)


def by_hand(model, params, prompt, block_ends):
    """Algorithm 1 for one prompt: final tokens, order, hidden rows, and every state on the way."""
    shift, total = int(model.config.shift_logits), block_ends[-1]
    ids = np.array([*prompt, *[MASK] * (total - len(prompt))], np.int32)
    place = np.arange(WIDTH, dtype=np.int32)
    positions = jnp.asarray(np.where(place < total, place, -1))
    rank = np.full(total, -1)
    hidden = np.zeros((total, model.config.hidden_size))
    states = []
    for step in range(total - len(prompt)):
        states.append(ids.copy())
        fed = jnp.asarray(np.pad(ids, (0, WIDTH - total)))
        out = passes(model)(params, fed, positions)
        end = next(end for end in block_ends if (ids[:end] == MASK).any())
        logits = np.asarray(out.logits[0], np.float64)
        logits[:, MASK] = -np.inf
        open_ = [i for i in range(len(prompt), end) if ids[i] == MASK]
        sure = [1 / np.exp(logits[i - shift] - logits[i - shift].max()).sum() for i in open_]
        best = open_[int(np.argmax(sure))]
        ids[best], rank[best] = logits[best - shift].argmax(), step
        hidden[best] = out.hidden[0, best - shift]
    begin = len(prompt)
    return ids[begin:], rank[begin:], hidden[begin:], [state[begin:] for state in states]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_equals_the_algorithm_by_hand(aligned, shift):
    model = teacher(shift_logits=shift)
    params, (tokens, lengths) = tiny_params(model), ragged()
    found = collect(
        model, params, tokens, lengths, length=LENGTH, block_size=BLOCK, aligned=aligned
    )
    for row, size in enumerate(lengths.tolist()):
        first = size // BLOCK * BLOCK if aligned else size
        last = (size + LENGTH) // BLOCK * BLOCK if aligned else size + LENGTH
        ends = list(range(first + BLOCK, last + 1, BLOCK))
        prompt = np.asarray(tokens[row, :size])
        ids, rank, hidden, states = by_hand(model, params, prompt, ends)
        count = len(ids)
        assert count == response_lengths(lengths, LENGTH, BLOCK, aligned=aligned)[row]
        np.testing.assert_array_equal(found.tokens[row, :count], ids)
        np.testing.assert_array_equal(found.rank[row, :count], rank)
        np.testing.assert_allclose(found.hidden[row, :count], hidden, atol=GOLDEN_HIDDEN)
        assert (np.asarray(found.rank[row, count:]) == -1).all()
        for step, state in enumerate(states):  # the ranks hold every state on the way
            seen = visible(found.rank[row, :count], jnp.int32(step))
            np.testing.assert_array_equal(jnp.where(seen, found.tokens[row, :count], MASK), state)


def test_equals_one_token_per_step_decoding():
    model = teacher()
    params, (tokens, lengths) = tiny_params(model), ragged()
    found = collect(model, params, tokens, lengths, length=LENGTH, block_size=BLOCK)
    prompts = [np.asarray(tokens[row, :size]).tolist() for row, size in enumerate(lengths.tolist())]
    decoder = Diffusion(model=model, block_size=BLOCK)
    sampling = SamplingConfig(max_new_tokens=LENGTH, ignore_eos=True)
    out = Generator(model, params, decoder=decoder).generate(prompts, sampling)
    np.testing.assert_array_equal(out.tokens, found.tokens)


def test_drawn_tokens_depend_on_the_row_number_not_on_the_batch():
    model = teacher()
    params, (tokens, lengths) = tiny_params(model, 1.0), ragged((5, 5, 5))
    tokens = jnp.tile(tokens[:1], (3, 1))
    settings = {"length": LENGTH, "block_size": BLOCK, "temperature": 1.0}
    key = jax.random.key(3)
    rows = jnp.array([4, 9, 4])
    found = collect(model, params, tokens, lengths, **settings, key=key, rows=rows)
    alone = collect(model, params, tokens[:1], lengths[:1], **settings, key=key, rows=rows[1:2])
    np.testing.assert_array_equal(found.tokens[0], found.tokens[2])
    assert (found.tokens[0] != found.tokens[1]).any()
    np.testing.assert_array_equal(found.tokens[1], alone.tokens[0])
    assert not (found.tokens == MASK).any()


def test_refuses_what_it_cannot_do():
    model, (tokens, lengths) = teacher(), ragged()
    good = {"length": LENGTH, "block_size": BLOCK}
    for changes, message in [
        ({"temperature": 0.5}, "needs a key"),
        ({"length": 3, "aligned": True}, "length=3 must be >= block_size=4"),
        ({"block_size": 0}, "block_size=0 must be >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            collect(model, {}, tokens, lengths, **{**good, **changes})
    with pytest.raises(ValueError, match="that is not causal"):
        collect(tiny_model(), {}, tokens, lengths, **good)
