# SPDX-License-Identifier: Apache-2.0
"""LoSA: every step against its definition, what it may read, and whole blocks through a model."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax import config, kvcache
from sqzjax.analysis import hlo
from sqzjax.attention import Mask
from sqzjax.kvcache import Dense, LoSA, Quest
from tests.sqzjax.paged import (
    HEADS,
    KV_HEADS,
    WIDTH,
    Row,
    attending,
    block_mask,
    empty,
    new_tokens,
    query_of,
    spec,
    updated,
)
from tests.tolerances import CHUNKED

BLOCK, CAPACITY = 8, 96
SMALL = LoSA(budget=8, page_size=4, active_tokens=3, block_size=BLOCK)
TOLERANCE = CHUNKED["float32"]


@partial(jax.jit, static_argnums=(0, 1))
def stepped(policy, size, state, k, v, q, positions):
    state = policy.update(state, new_tokens(k, v, positions))
    return policy.attend(state, query_of(q, positions, block_mask(size)))


class Stream:
    """A batch of rows that denoise their blocks, and the policy's state beside them."""

    def __init__(self, policy, prompts, seed=0, size=BLOCK, capacity=CAPACITY):
        self.rng = np.random.default_rng(seed)
        self.policy, self.size = policy, size
        self.start = np.array(prompts)
        width = capacity  # whatever the prompts, so that one program writes them
        k, v = self.normal(width, KV_HEADS), self.normal(width, KV_HEADS)
        positions = np.where(np.arange(width) < self.start[:, None], np.arange(width), -1)
        state = empty(policy, capacity, len(prompts))
        self.state = updated(policy, state, k, v, positions)
        self.rows = [Row(policy) for _ in prompts]
        for row, *tokens in zip(self.rows, positions, k, v):
            row.mask_size = size
            row.write(*tokens)
        self.q = self.normal(size, HEADS)
        self.k = self.normal(size, KV_HEADS)

    def normal(self, length, heads):
        return self.rng.normal(size=(len(self.start), length, heads, WIDTH)).astype(np.float32)

    def _step(self, *arrays):
        return stepped(self.policy, self.size, *arrays)

    def positions(self, idle=()):
        positions = self.start[:, None] + np.arange(self.size)
        positions[list(idle)] = -1
        return positions

    def step(self, idle=(), share=0.4):
        """Change some tokens of each block a little or a lot; return output and reference."""
        moved = self.rng.random((len(self.start), self.size, 1, 1)) < share
        self.q = self.q + moved * self.rng.choice([0.1, 1.0]) * self.normal(self.size, HEADS)
        self.k = np.where(moved, self.normal(self.size, KV_HEADS), self.k)
        positions, v = self.positions(idle), self.normal(self.size, KV_HEADS)
        part, self.state, _ = self._step(self.state, self.k, v, self.q, positions)
        expected = []
        for row, at, q, k, value in zip(self.rows, positions, self.q, self.k, v):
            row.write(at, k, value)
            expected.append(row.step(at, q.astype(np.float64)))
        return part, np.stack(expected)


truncated = jax.jit(SMALL.truncate)


def exactly(stream):
    """Dense attention of the current block."""
    attend = attending(Dense(), block_mask(stream.size))
    return attend(stream.state.tokens, stream.q, stream.positions()).partial


@pytest.mark.parametrize(
    "policy",
    [
        SMALL,
        replace(SMALL, reference="computed", active_tokens=2),
        replace(SMALL, budget=32, page_size=16, active_tokens=1, block_size=16),
        replace(SMALL, budget=16, active_tokens=BLOCK),
    ],
    ids=["last", "computed", "pages_wider_than_blocks", "all_active"],
)
def test_every_step_equals_its_definition(policy):
    """Rows open their blocks at different steps, begin without a context, and fall idle."""
    stream = Stream(policy, [0, 40, 24, 56])
    opens = {3: [1], 5: [0, 2], 6: [3], 8: [1]}
    for number in range(11):
        for row in opens.get(number, ()):
            stream.start[row] += BLOCK
        idle = [2] if number in (4, 9) else [3] if number > 8 else []
        part, expected = stream.step(idle)
        np.testing.assert_allclose(part.out, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for name in ("read", "held", "dense"):
        counted = np.asarray(getattr(stream.state.counts, name))
        np.testing.assert_array_equal(counted, [getattr(row, name) for row in stream.rows])
    report = policy.report(stream.state)
    assert report["pages_read"] == sum(row.read for row in stream.rows) > 0
    assert report["pages_read"] < report["pages_held"]


def test_an_idle_row_sees_nothing_and_keeps_its_block():
    stream = Stream(SMALL, [32, 16])
    stream.step()
    before = stream.state
    part, _ = stream.step(idle=[0])
    assert not np.any(np.asarray(part.out)[0]) and np.all(np.isfinite(part.lse))
    for name in ("start", "positions", "q", "out", "lse"):
        old, new = (np.asarray(getattr(state.memory, name))[0] for state in (before, stream.state))
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("page_size", [4, 16])
def test_all_tokens_active_and_a_full_budget_equal_dense_attention(page_size):
    policy = LoSA(budget=CAPACITY, page_size=page_size, active_tokens=BLOCK, block_size=BLOCK)
    stream = Stream(policy, [40, 16, 0])
    for _ in range(4):
        part, _ = stream.step()
    expected = exactly(stream)
    np.testing.assert_allclose(part.out, expected.out, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(part.lse, expected.lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_queries_across_a_block_edge_equal_dense_attention():
    """The keys before the edge change with every step, so nothing may be reused."""
    stream = Stream(SMALL, [44, 13])
    for _ in range(3):
        positions, v = stream.positions(), stream.normal(BLOCK, KV_HEADS)
        stream.q, k = stream.normal(BLOCK, HEADS), stream.normal(BLOCK, KV_HEADS)
        part, stream.state, _ = stream._step(stream.state, k, v, stream.q, positions)
        expected = exactly(stream)
        np.testing.assert_allclose(part.out, expected.out, atol=TOLERANCE, rtol=TOLERANCE)
        np.testing.assert_allclose(part.lse, expected.lse, atol=TOLERANCE, rtol=TOLERANCE)
    assert SMALL.report(stream.state)["pages_read"] == 0


def test_unchanged_queries_reuse_exactly():
    stream = Stream(replace(SMALL, active_tokens=0), [40, 16, 72])
    for _ in range(3):
        part, _ = stream.step(share=0.0)
        expected = exactly(stream)
        np.testing.assert_allclose(part.out, expected.out, atol=TOLERANCE, rtol=TOLERANCE)
    assert SMALL.report(stream.state)["pages_read"] == 0


def test_the_error_of_a_reused_token_is_bounded_by_its_drift():
    """d out / d q = scale * sum_i p_i (v_i - out) k_i^T, whatever the query."""
    stream = Stream(replace(SMALL, active_tokens=0, reference="computed"), [64, 48])
    stream.step()
    reference, remembered = stream.q, np.asarray(stream.state.memory.out)
    k, v = (np.asarray(x, np.float64) for x in (stream.state.tokens.k, stream.state.tokens.v))
    slope = 2 * np.linalg.norm(k, axis=-1).max() * np.linalg.norm(v, axis=-1).max()
    for size in (1e-3, 1e-2, 0.1):
        q = reference + size * stream.normal(BLOCK, HEADS)
        drift = np.linalg.norm(q - reference, axis=-1)
        for b, row in enumerate(stream.rows):
            context = np.arange(stream.start[b])
            for t, head in np.ndindex(BLOCK, HEADS):
                exact, _ = row.attend(q[b, t].astype(np.float64), head, context)
                error = np.linalg.norm(remembered[b, t, head] - exact)
                bound = slope * drift[b, t, head] / np.sqrt(WIDTH)
                assert error <= bound + TOLERANCE


def test_rows_do_not_depend_on_their_batch():
    """Row 1 is denoised in the company of rows that open blocks, and alone."""
    together = Stream(SMALL, [24, 40, 56])
    alone = jax.jit(SMALL.reorder)(together.state, np.array([1]))
    for number in range(6):
        together.start[[0, 2]] += BLOCK * (number % 2)
        moved = together.normal(BLOCK, HEADS) * (together.rng.random((3, BLOCK, 1, 1)) < 0.5)
        q, k, v = together.q + moved, together.k, together.normal(BLOCK, KV_HEADS)
        together.q, positions = q, together.positions()
        part, together.state, _ = together._step(together.state, k, v, q, positions)
        one, alone, _ = together._step(alone, *(x[1:2] for x in (k, v, q, positions)))
        np.testing.assert_allclose(
            np.asarray(part.out)[1:2], one.out, atol=TOLERANCE, rtol=TOLERANCE
        )
    assert int(alone.counts.read[0]) == int(together.state.counts.read[1]) > 0


def test_nothing_but_chosen_pages_enters_a_sparse_step():
    """Keys and values outside the chosen pages are made NaN, which any product would spread."""
    stream = Stream(SMALL, [80])
    stream.step()
    state, row = stream.state, stream.rows[0]
    q = stream.q.copy()
    q[0, :3] += 1.0
    tokens = np.zeros((KV_HEADS, CAPACITY), bool)
    tokens[:, 80:88] = True
    for kv in range(KV_HEADS):
        for page in row.chosen_pages(q[0, :3].astype(np.float64), 80, kv):
            tokens[kv, page * 4 : page * 4 + 4] = True
    assert tokens.sum() < tokens.size / 2
    hide = lambda x: np.where(tokens[None, :, :, None], x, np.float32(np.nan))  # noqa: E731
    held = replace(state.tokens, k=hide(state.tokens.k), v=hide(state.tokens.v))
    attend = attending(SMALL, block_mask(BLOCK))
    clean = attend(state, q, stream.positions()).partial.out
    poisoned = attend(replace(state, tokens=held), q, stream.positions()).partial.out
    np.testing.assert_array_equal(clean, poisoned)


def whole_cache_readers(jaxpr, size, taken):
    """Primitives with an operand of at least `size` elements; `taken(cond)` lists its branches."""
    found = set()
    for equation in jaxpr.eqns:
        inner = [
            getattr(item, "jaxpr", item)
            for value in equation.params.values()
            for item in (value if isinstance(value, tuple | list) else (value,))
            if hasattr(getattr(item, "jaxpr", item), "eqns")
        ]
        if equation.primitive.name == "cond":
            inner = [inner[i] for i in taken(equation)]
        for body in inner:
            found |= whole_cache_readers(body, size, taken)
        large = any(getattr(v.aval, "size", 0) >= size for v in equation.invars)
        if large and not inner:
            found.add(equation.primitive.name)
    return found


def test_a_sparse_step_reads_the_cache_through_gathers_only():
    """The first condition is whether a row opens a block, its second branch the dense read."""
    capacity = 1 << 14
    policy = LoSA(budget=256, active_tokens=8)
    state = jax.eval_shape(lambda: policy.init(spec(capacity), 2))
    size = KV_HEADS * capacity * WIDTH  # elements of one row's keys

    def attend(state, q, positions):
        return policy.attend(state, query_of(q, positions, block_mask(16)))

    q = jax.ShapeDtypeStruct((2, 16, HEADS, WIDTH), jnp.float32)
    positions = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    jaxpr = jax.make_jaxpr(attend)(state, q, positions).jaxpr
    conditions = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conditions) == 2

    def sparse(equation):
        return (0,) if equation is conditions[0] else range(len(equation.params["branches"]))

    readers = whole_cache_readers(jaxpr, size, sparse)
    assert readers <= {"gather", "reshape", "dynamic_slice"}, readers
    every = whole_cache_readers(jaxpr, size, lambda e: range(len(e.params["branches"])))
    assert "dot_general" in every  # the dense branch, so the search does find readers


def test_a_compiled_step_copies_no_cache():
    capacity, policy = 5 << 10, LoSA(budget=64)

    def step(state, k, v, q, positions):
        state = policy.update(state, new_tokens(k, v, positions))
        return policy.attend(state, query_of(q, positions, block_mask(16)))

    shapes = [(2, 16, heads, WIDTH) for heads in (KV_HEADS, KV_HEADS, HEADS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    positions = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    state = jax.eval_shape(lambda: policy.init(spec(capacity), 2))
    program = jax.jit(step, donate_argnums=0).lower(state, *arrays, positions).compile()
    size = [2 * KV_HEADS * capacity * WIDTH * 4]
    module = hlo.parse(program.as_text())
    made = {
        instruction.opcode
        for body in module.computations.values()
        for instruction in body.values()
        if instruction.shape.startswith("f32") and hlo.shape_bytes(instruction.shape) == size
    }
    # The writes of new keys and values, in place, and other names of the same memory.
    assert made <= {"scatter", "fusion", "parameter", "bitcast", "get-tuple-element"}, made
    assert "scatter" in made


@pytest.mark.parametrize("change", ["truncate", "rewrite"])
def test_a_changed_context_is_attended_to_anew(change):
    stream = Stream(replace(SMALL, active_tokens=0), [40])
    stream.step()
    k, v = stream.normal(8, KV_HEADS), stream.normal(8, KV_HEADS)
    positions = np.arange(32, 40)[None]
    if change == "truncate":
        stream.state = truncated(stream.state, np.array([32], np.int32))
        assert int(SMALL.lengths(stream.state)[0]) == 32
    stream.state = updated(SMALL, stream.state, k, v, positions)
    stream.rows[0].write(positions[0], k[0], v[0])
    stream.rows[0].block = {}
    part, expected = stream.step()
    np.testing.assert_allclose(part.out, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_block_begins_anew_when_all_of_it_is_truncated():
    """As the decoder does before the pass that leaves the keys of a finished block."""
    stream = Stream(SMALL, [40])
    stream.step()
    stream.state = truncated(stream.state, np.array([41], np.int32))
    assert int(stream.state.memory.start[0]) == 40
    stream.state = truncated(stream.state, np.array([40], np.int32))
    assert int(stream.state.memory.start[0]) == -1


def test_bytes_of_a_step_follow_from_shapes():
    stream = Stream(SMALL, [40, 24])
    read = SMALL.bytes_read(stream.state, pages=10, block=BLOCK)
    pages = CAPACITY // 4
    assert read == {
        "pages": 10 * 4 * WIDTH * 2 * 4,
        "bounds": KV_HEADS * pages * 2 * WIDTH * 4,
        "block": BLOCK * KV_HEADS * WIDTH * 2 * 4,
        "memory": 4 + BLOCK * 4 + BLOCK * HEADS * (2 * WIDTH + 1) * 4,
    }


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"budget": 100}, "use 96 or 112"),
        ({"budget": 16}, "use 32 or 48"),
        ({"page_size": 0}, "page_size=0"),
        ({"dense_layers": -1}, "dense_layers=-1"),
        ({"active_tokens": -1}, "active_tokens=-1"),
        ({"block_size": 0}, "block_size="),
    ],
)
def test_settings_out_of_range_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        LoSA(**fields)


def test_what_has_no_frozen_context_is_refused():
    stream = Stream(SMALL, [40])
    query = query_of(stream.q, stream.positions(), block_mask(BLOCK))
    with pytest.raises(ValueError, match="window=8"):
        SMALL.init(replace(spec(32), window=8), 1)
    with pytest.raises(ValueError, match="window=8"):
        SMALL.attend(stream.state, query._replace(window=8))
    with pytest.raises(ValueError, match=r"mask\.kind='bidirectional'"):
        SMALL.attend(stream.state, query._replace(mask=Mask(kind="bidirectional")))
    with pytest.raises(ValueError, match="must be at least the model's, 16"):
        SMALL.attend(stream.state, query._replace(mask=block_mask(16)))


def test_configurations_name_the_policies():
    loaded = config.load(kvcache.CacheConfig, {"kind": "losa", "budget": 128, "active_tokens": 5})
    assert loaded == LoSA(budget=128, active_tokens=5)
    assert config.load(kvcache.CacheConfig, {"kind": "quest"}) == Quest()
