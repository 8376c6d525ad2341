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
    Ancestral,
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


def block_of(score, masked, step, seed):
    """Many rows of one block, each with its own noise."""
    rows = 20_000
    score = jnp.broadcast_to(jnp.asarray(score, jnp.float32), (rows, len(score)))
    masked = jnp.broadcast_to(jnp.asarray(masked), score.shape)
    count = jnp.sum(masked, axis=1)
    noise = jax.random.uniform(jax.random.key(seed), score.shape)
    at = jnp.full(rows, step, jnp.int32)
    return Candidates(score, score, -score, masked, at, count, noise=noise)


@pytest.mark.parametrize(("score", "heat"), [("confidence", 0.3), ("random", 0.0)])
def test_positions_are_drawn_from_the_softmax_without_replacement(score, heat):
    """Dream's `alg_temp`: frequencies of every pair of two drawn in a step."""
    sure = np.array([0.9, 0.2, 0.5, 0.7])
    policy = TopCount(steps=2, score=score, temperature=heat)
    given = block_of(sure if heat else np.zeros(4), [True, True, False, True], 0, 1)
    chosen = np.asarray(jax.jit(policy.commit)(given))
    assert not chosen[:, 2].any() and (chosen.sum(axis=1) == 2).all()
    weight = np.exp(sure / heat) if heat else np.ones(4)
    weight /= weight[[0, 1, 3]].sum()
    for left in (0, 1, 3):  # the one of three that is not drawn
        a, b = (i for i in (0, 1, 3) if i != left)
        chance = weight[a] * weight[b] * (1 / (1 - weight[a]) + 1 / (1 - weight[b]))
        assert (~chosen[:, left]).mean() == pytest.approx(chance, abs=0.012)


def test_a_cold_draw_takes_the_surest():
    given = block_of([0.5, 0.1, 0.9, 0.3], [True] * 4, 0, 2)
    cold = np.asarray(TopCount(steps=2, temperature=1e-3).commit(given))
    assert (cold == [True, False, True, False]).all()


def test_ancestral_steps_fill_each_position_by_chance_and_end():
    """Of 30 masked positions, the share by which the time falls; the last step fills the rest."""
    policy, steps = Ancestral(steps=5, eps=0.05), 5
    time = np.linspace(1, 0.05, steps + 1)
    masked = [True] * 30 + [False] * 2
    for step in range(steps):
        given = block_of(np.zeros(32), masked, step, step)
        chosen = np.asarray(policy.commit(given))
        assert not chosen[:, 30:].any()
        share = 1 - time[step + 1] / time[step] if step < steps - 1 else 1.0
        np.testing.assert_allclose(chosen[:, :30].mean(axis=0), share, atol=0.015)
        spread = share * (1 - share) * 30  # of a binomial: each position by itself
        assert chosen[:, :30].sum(axis=1).var() == pytest.approx(spread, rel=0.06)


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("TopCount", {"steps": -1}),
        ("TopCount", {"temperature": -1.0}),
        ("TopCount", {"temperature": 1e-9}),
        ("Ancestral", {"steps": 0}),
        ("Ancestral", {"eps": 1.0}),
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
