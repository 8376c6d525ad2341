# SPDX-License-Identifier: Apache-2.0
"""The contract that every cache policy of `caches.CASES` passes, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contracts.caches import CASES, CacheCase, parameters
from tests.contracts.layer import BATCH, MAX_NEW, Layer, layer_of
from tests.tolerances import CHUNKED, LSE_ATOL

pytestmark = pytest.mark.parametrize("case", parameters(CASES))
LENGTH = 40  # a multiple of every chunk


def _close(case: CacheCase, actual, expected):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, atol=CHUNKED[case.dtype], rtol=CHUNKED[case.dtype]
    )


def _same_state(layer: Layer, a, b, query):
    """Two states are the same cache if they hold the same lengths and answer alike."""
    policy = layer.case.policy
    np.testing.assert_array_equal(policy.lengths(a), policy.lengths(b))
    outs = [layer.attend(state, query).partial.out for state in (a, b)]
    _close(layer.case, *outs)


def test_full_budget_equals_reference(case):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), LENGTH - 4)
    last = np.arange(LENGTH - 4, LENGTH)
    part = layer.attend(layer.update(state, layer.new(last)), layer.query(last)).partial
    out, lse = layer.reference(layer.query(last), [LENGTH] * BATCH)
    assert part.out.dtype == part.lse.dtype == jnp.float32
    _close(case, part.out, out)
    tolerance = LSE_ATOL[case.dtype] if case.dtype == "float32" else CHUNKED[case.dtype]
    np.testing.assert_allclose(part.lse, lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_chunked_equals_whole(case, chunk):
    layer = layer_of(case, LENGTH)
    outs = []
    state = case.policy.init(layer.spec, BATCH)
    for start in range(0, LENGTH, chunk):
        part, state, _ = layer.run(state, start, chunk)
        outs.append(part.out)
    out, _ = layer.reference(layer.query(np.arange(LENGTH)), [LENGTH] * BATCH)
    _close(case, jnp.concatenate(outs, axis=1), out)


def test_empty_cache_gives_zero_output_and_finite_lse(case):
    layer = layer_of(case, LENGTH)
    state = case.policy.init(layer.spec, BATCH)
    part = layer.attend(state, layer.query(np.arange(4))).partial
    assert not np.any(part.out) and np.all(np.isfinite(part.lse))


def test_no_two_fields_of_an_empty_cache_share_a_buffer(case):
    """A step that takes its cache over (donation) could not be given one twice."""
    layer = layer_of(case, LENGTH)
    leaves = jax.tree.leaves(case.policy.init(layer.spec, BATCH))
    held = [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.nbytes]
    assert len(set(held)) == len(held)


def test_truncate_then_append_equals_fresh(case):
    layer = layer_of(case, LENGTH)
    keep = np.array([30, 25, 28])
    state = layer.fill(case.policy.init(layer.spec, BATCH), 34)
    state = layer.truncate(state, keep)
    np.testing.assert_array_equal(case.policy.lengths(state), keep)
    fresh = case.policy.init(layer.spec, BATCH)
    for start in range(0, 30, MAX_NEW):
        tokens = np.arange(start, min(start + MAX_NEW, 30))
        positions = np.where(tokens[None] < keep[:, None], tokens, -1)
        fresh = layer.update(fresh, layer.new(np.tile(tokens, (BATCH, 1)), positions))
    tokens = keep[:, None] + np.arange(4)
    states = [layer.update(s, layer.new(tokens)) for s in (state, fresh)]
    _same_state(layer, *states, layer.query(tokens))
    out, _ = layer.reference(layer.query(tokens), keep + 4)
    _close(case, layer.attend(states[0], layer.query(tokens)).partial.out, out)


def test_truncate_beyond_length_changes_nothing_and_zero_empties(case):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), 14)
    query = layer.query(np.full(1, 14))
    _same_state(layer, layer.truncate(state, [99] * BATCH), state, query)
    empty = layer.truncate(state, [0] * BATCH)
    assert not np.any(layer.attend(empty, query).partial.out)
    first = np.arange(4)
    part = layer.attend(layer.update(empty, layer.new(first)), layer.query(first)).partial
    out, _ = layer.reference(layer.query(first), [4] * BATCH)
    _close(case, part.out, out)


def test_overwrite_at_positions(case):
    """Tokens 20..23 are first written wrongly, then rewritten in place, as in block diffusion."""
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), 20)
    state = layer.update(state, layer.new(np.arange(4), np.arange(20, 24)))
    state = layer.update(state, layer.new(np.arange(20, 24)))
    np.testing.assert_array_equal(case.policy.lengths(state), [24] * BATCH)
    query = layer.query(np.arange(20, 24))
    out, _ = layer.reference(query, [24] * BATCH)
    _close(case, layer.attend(state, query).partial.out, out)


def test_reorder_forks_and_drops(case):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), 20)
    rows = jnp.array([2, 0, 0])
    moved = layer.reorder(state, rows)
    np.testing.assert_array_equal(case.policy.lengths(moved), [20] * 3)
    query = layer.query(np.full(1, 20))
    expected = layer.attend(state, query).partial.out[rows]
    forked = query._replace(
        q=query.q[rows], q_pre=query.q_pre[rows], positions=query.positions[rows]
    )
    _close(case, layer.attend(moved, forked).partial.out, np.asarray(expected, np.float64))


def test_nbytes_equals_allocated_bytes(case):
    layer = layer_of(case, LENGTH)
    state = layer.fill(case.policy.init(layer.spec, BATCH), 20)
    shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
    assert case.policy.nbytes(state) == sum(shard.data.nbytes for shard in shards)


def test_nothing_is_written_beyond_capacity_or_for_padding(case):
    """A canary: leaves stay byte-identical when every new token is padding or out of range."""
    layer = layer_of(case, LENGTH)
    capacity = case.capacity
    state = layer.fill(case.policy.init(layer.spec, BATCH), 33)
    for positions in (np.full(4, -1), capacity + np.arange(4), np.array([capacity, -1, -1, -1])):
        after = layer.update(state, layer.new(np.arange(len(positions)), positions))
        jax.tree.map(np.testing.assert_array_equal, state, after)


def test_ragged_batch_equals_each_row_alone(case):
    layer = layer_of(case, LENGTH)
    lengths = np.array([5, 31, 16])
    state = case.policy.init(layer.spec, BATCH)
    for start in range(0, 32, MAX_NEW):
        tokens = np.arange(start, start + MAX_NEW)
        positions = np.where(tokens[None] < lengths[:, None], tokens, -1)
        state = layer.update(state, layer.new(np.tile(tokens, (BATCH, 1)), positions))
    np.testing.assert_array_equal(case.policy.lengths(state), lengths)
    query = layer.query(lengths[:, None] - 1)
    out, _ = layer.reference(query, lengths)
    _close(case, layer.attend(state, query).partial.out, out)


def test_one_compilation_for_all_lengths(case):
    layer = layer_of(case, LENGTH)
    state = case.policy.init(layer.spec, BATCH)
    programs = []
    for position in range(12):
        state = layer.update(state, layer.new([position]))
        _, state, _ = layer.attend(state, layer.query([position]))
        programs.append(layer.programs())
    assert len(set(programs)) == 1


@pytest.mark.parametrize("cycles", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_append_truncate_cycles_equal_a_fresh_cache(case, cycles):
    layer = layer_of(case, LENGTH)
    rng = np.random.default_rng(1)

    state = layer.fill(case.policy.init(layer.spec, BATCH), 20)
    length = 20
    for _ in range(cycles):
        kept = int(rng.integers(0, 5))
        tokens = np.arange(length, length + 4)
        state = layer.truncate(layer.update(state, layer.new(tokens)), [length + kept] * BATCH)
        length = min(length + kept, length + 4)
        if length > LENGTH - 6:
            state = layer.truncate(state, [0] * BATCH)
            state, length = layer.fill(state, 20), 20
    fresh = layer.fill(case.policy.init(layer.spec, BATCH), length)
    _same_state(layer, state, fresh, layer.query(np.full(1, length)))
