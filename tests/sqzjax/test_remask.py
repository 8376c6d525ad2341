# SPDX-License-Identifier: Apache-2.0
"""Tokens that are taken back: a policy that remasks, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode.commit import Candidates, Hierarchical
from sqzjax.decode.reuse import Delayed, Exact, NoReuse, Prefix
from tests.sqzjax.diffusion_reference import (
    BLOCK,
    MASK,
    PROMPTS,
    chances,
    decode,
    forward_of,
    model_of,
)

# Small random models are sure of little.
POLICY = Hierarchical(threshold=0.3, low=0.1, remask=0.2)
STRICT = Hierarchical(threshold=0.9, low=0.4, remask=0.4)


def hierarchical(sure, held, policy):
    """Return the places to fill and those to mask again; both score -1 elsewhere, `held` inf."""
    masked = sure >= 0
    doubtful = [i for i in np.argsort(held, kind="stable") if held[i] < policy.remask]
    again = doubtful[: max(int(masked.sum()) - 1, 0)]
    runs = np.split(np.arange(len(sure)), np.flatnonzero(np.diff(masked)) + 1)
    tops = {int(run[sure[run].argmax()]) for run in runs if masked[run[0]]}
    order = [i for i in np.argsort(-sure, kind="stable") if masked[i]]
    filled = set(order[: len(again) + 1]) | {i for i in order if sure[i] > policy.threshold}
    return filled | {i for i in tops if sure[i] > policy.low}, set(again)


def by_definition(family, prompt, count, policy):
    """Return the tokens after a prompt, the passes, and how many tokens were taken back."""
    model, params = model_of(family)
    aligned = model.config.mask == "block_causal"
    total = len(prompt) + count
    total = -(-total // BLOCK) * BLOCK if aligned else total
    ids = np.full((1, total), MASK, np.int32)
    ids[0, : len(prompt)] = prompt
    start = len(prompt) // BLOCK * BLOCK if aligned else len(prompt)
    passes = again = 0
    while start < total:
        stop = min(start + BLOCK, total)
        place = np.arange(start, stop)
        while (ids[0, place] == MASK).any():
            chance = chances(forward_of(model)(params, ids, np.arange(total)[None]), model.config)
            chance, here = chance[0, start:stop], ids[0, start:stop]
            sure = np.where(here == MASK, chance.max(-1), -1)
            open_ = (here == MASK) | (place < len(prompt))
            held = np.where(open_, np.inf, chance[np.arange(len(here)), here])
            filled, back = hierarchical(sure, held, policy)
            for i in back:
                ids[0, start + i] = MASK
            for i in filled:
                ids[0, start + i] = chance[i].argmax()
            passes, again = passes + 1, again + len(back)
        start = stop
    return ids[0, len(prompt) : len(prompt) + count].tolist(), passes, again


@pytest.mark.parametrize(
    ("family", "reuse"),
    [
        pytest.param("bidirectional", NoReuse(), marks=pytest.mark.slow),
        ("block_causal", Exact()),
        pytest.param("shifted", Prefix(refresh=1), marks=pytest.mark.slow),
    ],
)
def test_doubtful_tokens_are_taken_back(family, reuse):
    out = decode(family, PROMPTS, reuse=reuse, commit=POLICY)
    expected = [by_definition(family, prompt, 10, POLICY) for prompt in PROMPTS]
    assert [list(row) for row in out.tokens] == [tokens for tokens, _, _ in expected]
    assert sum(again for _, _, again in expected) > 0, "nothing was taken back"
    if not isinstance(reuse, Exact):  # which spends passes of its own
        assert out.stats.extra["row_forwards"] == sum(passes for _, passes, _ in expected)


@pytest.mark.slow
def test_without_doubt_nothing_changes():
    plain = Hierarchical(threshold=0.3, low=0.1)
    timid = Hierarchical(threshold=0.3, low=0.1, remask=1e-9)
    one, other = (decode("bidirectional", PROMPTS, commit=x).tokens for x in (plain, timid))
    np.testing.assert_array_equal(one, other)


@jax.jit
def decisions(level, masked, held):
    """Return what a policy fills and takes back of one block."""
    step = jnp.zeros(1, jnp.int32)
    block = Candidates(
        level[None], level[None], 1 - level[None], masked[None], step, step, held[None]
    )
    return STRICT.commit(block)[0], STRICT.reopens(block)[0]


levels = st.floats(0, 1, width=32, allow_subnormal=False)
places = st.lists(st.tuples(levels, st.sampled_from("mhf")), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(block=places)
def test_every_step_leaves_fewer_masks(block):
    level, kind = np.array([x for x, _ in block], np.float32), np.array([k for _, k in block])
    masked, held = kind == "m", np.where(kind == "h", level, np.inf).astype(np.float32)
    filled, back = map(np.asarray, decisions(level, masked, held))
    expected = hierarchical(np.where(masked, level, -1), held, STRICT)
    assert (set(np.flatnonzero(filled)), set(np.flatnonzero(back))) == expected
    assert not np.any(filled & ~masked) and not np.any(back & (kind != "h"))
    assert back.sum() < max(filled.sum(), 1) and filled.any() == masked.any()


def test_reuse_without_predictions_of_all_tokens_is_refused():
    with pytest.raises(ValueError, match=r"reuse\.kind='delayed' leaves out"):
        decode("bidirectional", PROMPTS, reuse=Delayed(), commit=POLICY)
