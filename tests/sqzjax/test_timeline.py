# SPDX-License-Identifier: Apache-2.0
"""Dividing a profiled step among its operations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqzjax.analysis.timeline import Interval, breakdown, busy_times, part_of

SPANS = st.lists(
    st.tuples(
        st.integers(0, 50), st.integers(0, 20), st.sampled_from("abc"), st.sampled_from("tu")
    ),
    max_size=12,
)


def test_nested_and_parallel_intervals():
    intervals = [
        Interval("while.1", "a", 0, 100),
        Interval("outer", "a", 10, 50),
        Interval("inner", "a", 20, 30),
        Interval("other", "b", 40, 60),
    ]
    assert busy_times(intervals) == {"outer": 10 + 10 + 5, "inner": 10, "other": 5 + 10}


@given(SPANS)
def test_times_sum_to_the_time_in_which_anything_ran(spans):
    intervals = [Interval(n, t, start, start + long) for start, long, n, t in spans]
    covered = {now for i in intervals for now in range(int(i.start), int(i.end))}
    assert sum(busy_times(intervals).values()) == pytest.approx(len(covered))


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(advance)/while/body/DecoderLM/layers_0/attention/attn/q/dot_general", "linear"),
        ("jit(advance)/while/body/DecoderLM/layers_0/feed_forward/mlp/down/dot_general", "linear"),
        ("/params/layers_3/mlp/gate/kernel/", "linear"),
        ("jit(advance)/while/body/DecoderLM/layers_0/attention/attn/attn._attend/max", "attention"),
        ("/state/caches/states/0/k", "attention"),
        ("jit(advance)/while/body/DecoderLM/DecoderLM._logits/DecoderLM.head/dot_general", "head"),
        ("/params/head/kernel/", "head"),
        ("jit(advance)/while/body/reduce_max", "sampling"),
        ("jit(advance)/while/body/DecoderLM/layers_0/attention/attn_norm/mul", "rest"),
        ("jit(advance)/while/body/DecoderLM/final_norm/mul", "rest"),
        ("", "rest"),
    ],
)
def test_parts(scope, part):
    assert part_of(scope) == part


def test_breakdown_has_every_part():
    spent = breakdown([Interval("x", "t", 0, 3)], {"x": "jit(advance)/while/body/reduce_max"})
    assert spent == {"attention": 0, "linear": 0, "head": 0, "sampling": 3, "rest": 0}
