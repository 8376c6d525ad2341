# SPDX-License-Identifier: Apache-2.0
"""Policies of what a denoising step fills, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqzjax.decode import commit as policies
from sqzjax.decode.commit import (
    Candidates,
    EntropyBounded,
    Factor,
    Hierarchical,
    LocalLeap,
    Threshold,
    TopCount,
    ranks,
)

# XLA flushes subnormal numbers to zero, so they would tie.
chances = st.floats(0, 1, width=32, allow_subnormal=False)
EVERY = [
    TopCount(),
    TopCount(steps=3),
    Threshold(threshold=0.6),
    Threshold(threshold=0.6, decay=0.1),
    Threshold(threshold=0.9, steps=4),
    Factor(factor=1.0),
    LocalLeap(threshold=0.8, relaxed=0.5, radius=2),
    EntropyBounded(bound=0.5),
    Hierarchical(threshold=0.9, low=0.3),
]
OTHERS = [
    Threshold(threshold=0.8),
    LocalLeap(threshold=0.8, relaxed=0.5, radius=0),
    LocalLeap(threshold=0.8, relaxed=0.5),
]


@jax.jit
def chosen_by_all(confidence, masked, step):
    """Return the rank of every position of one block, and what each policy commits."""
    confidence, masked = confidence[None], masked[None]
    size = jnp.sum(masked, 1).astype(jnp.int32)
    given = Candidates(confidence, confidence, 1 - confidence, masked, step[None], size)
    chosen = jnp.stack([policy.commit(given)[0] for policy in EVERY + OTHERS])
    return ranks(given.score, given.masked)[0], chosen


def chosen_of(sure, masked, step=0):
    given = np.array(sure, np.float32), np.array(masked, bool), np.int32(step)
    place, chosen = map(np.asarray, chosen_by_all(*given))
    return place, dict(zip(EVERY + OTHERS, chosen))


blocks = st.lists(st.tuples(chances, st.booleans()), min_size=8, max_size=8)


@settings(max_examples=60, deadline=None)
@given(block=blocks, policy=st.sampled_from(EVERY), step=st.integers(0, 5))
def test_every_policy_fills_masks_only_and_at_least_one(block, policy, step):
    sure, masked = [x for x, _ in block], [m for _, m in block]
    chosen = chosen_of(sure, masked, step)[1][policy]
    assert not np.any(chosen & ~np.array(masked))
    assert chosen.any() == any(masked)
    assert any(masked) <= bool(chosen[np.argmax(np.where(masked, sure, -1))])


@settings(max_examples=60, deadline=None)
@given(block=blocks)
def test_policies_equal_their_definitions(block):
    sure = np.array([x for x, _ in block], np.float32)
    masked = np.array([m for _, m in block])
    place, chosen = chosen_of(sure, masked)

    def marks(policy):
        return set(np.flatnonzero(chosen[policy]).tolist())

    order = [i for i in np.argsort(-sure, kind="stable") if masked[i]]
    assert [int(place[i]) for i in order] == list(range(len(order)))
    best = set(order[:1])
    assert marks(TopCount(steps=3)) == set(order[: -(-len(order) // 3)])
    assert marks(Threshold(threshold=0.6)) == best | {i for i in order if sure[i] >= 0.6}
    most = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - sure[order[n - 1]]) <= 1]
    assert marks(Factor(factor=1.0)) == best | set(order[: max(most, default=0)])
    anchors = [i for i in order if sure[i] >= 0.8]
    near = {i for i in order if any(abs(i - a) <= 2 for a in anchors)}
    relaxed = {i for i in order if sure[i] >= (0.5 if i in near else 0.8)}
    assert marks(LocalLeap(threshold=0.8, relaxed=0.5, radius=2)) == best | relaxed
    assert marks(LocalLeap(threshold=0.8, relaxed=0.5, radius=0)) == marks(Threshold(threshold=0.8))
    assert marks(Threshold(threshold=0.8)) <= marks(LocalLeap(threshold=0.8, relaxed=0.5))
    runs = np.split(np.arange(8), np.flatnonzero(np.diff(masked)) + 1)
    tops = {int(r[np.argmax(sure[r])]) for r in runs if masked[r[0]]}
    expected = best | {i for i in tops if sure[i] > 0.3} | {i for i in order if sure[i] > 0.9}
    assert marks(Hierarchical(threshold=0.9, low=0.3)) == expected


def dream_counts(count, steps, eps=1e-3):
    """How many positions each step fills, as Dream's code has it."""
    time, left = np.linspace(1, eps, steps + 1, dtype=np.float32), count
    for step in range(steps):
        share = 1 - time[step + 1] / time[step]
        due = int(np.float32(left) * share) if step < steps - 1 else left
        left -= due
        yield due


@pytest.mark.parametrize(("count", "steps"), [(32, 8), (100, 10), (64, 64), (9, 4), (3, 7)])
def test_dreams_schedule_is_that_of_its_code(count, steps):
    """Two rows, the second of which begins with every third position filled."""
    policy = TopCount(steps=steps, schedule="dream", score="entropy")
    masked = np.ones((2, count), bool)
    masked[1, ::3] = False
    size = masked.sum(axis=1)
    expected = [list(dream_counts(int(n), steps)) for n in size]
    rng = np.random.default_rng(0)
    commit = jax.jit(policy.commit)
    for step in range(steps):
        score = rng.random(masked.shape).astype(np.float32)
        at = np.full(2, step, np.int32)
        given = Candidates(score, score, -score, jnp.asarray(masked), at, size.astype(np.int32))
        chosen = np.asarray(commit(given))
        assert [list(row)[step] for row in expected] == chosen.sum(axis=1).tolist()
        for row in range(2):  # the surest of those still masked
            kept = score[row, masked[row] & ~chosen[row]].max(initial=-1)
            assert np.all(score[row, chosen[row]] > kept)
        masked &= ~chosen
    assert not masked.any()


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("TopCount", {"steps": -1}),
        ("TopCount", {"steps": 0, "schedule": "dream"}),
        ("TopCount", {"eps": 0.0}),
        ("Threshold", {"threshold": -0.1}),
        ("Factor", {"factor": -1.0}),
        ("LocalLeap", {"relaxed": 0.95}),
        ("EntropyBounded", {"bound": -1.0}),
        ("Hierarchical", {"low": 1.0}),
        ("Hierarchical", {"remask": 0.95}),
    ],
)
def test_policies_refuse_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(policies, policy)(**fields)
