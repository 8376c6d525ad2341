# SPDX-License-Identifier: Apache-2.0
"""The cost table of rebuilding keys and values against published crossings and direct counts."""

import math

import pytest

from sqzjax.analysis.rebuild import (
    SIMILAR_BITS,
    choose_form,
    hidden_length,
    rebuild_cost,
    weight_bytes,
)
from tests.tolerances import PRINTED_TENTH, TWO_DIGITS

H100, H200 = 756e12 / 2e12, 989e12 / 4.8e12


@pytest.mark.parametrize(
    ("d_kv", "balance", "counted", "thousands"),
    [
        (4096, H100, "twice", 2.3),
        (1024, H100, "once", 40.6),
        (1024, H100, "twice", 41.6),
        (4096, H200, "twice", 1.2),
        (1024, H200, "once", 21.9),
    ],
)
def test_published_lengths(d_kv, balance, counted, thousands):
    found = hidden_length(d=4096, d_kv=d_kv, bits=2, balance=balance, counted=counted)
    assert abs(found / 1000 - thousands) <= max(PRINTED_TENTH, TWO_DIGITS * (thousands < 10))


@pytest.mark.parametrize(("d_kv", "form"), [(4096, "input"), (1024, "latent")])
def test_arithmetic_equals_traffic_at_the_crossing(d_kv, form):
    length = math.ceil(hidden_length(d=4096, d_kv=d_kv, bits=2, balance=H100))
    for tokens, hidden in ((length - 2, True), (length + 2, False)):
        cost = rebuild_cost(form, d=4096, d_kv=d_kv, length=tokens, bits=2)
        assert (cost.operations / H100 <= cost.moved) is hidden
    assert hidden_length(d=4096, d_kv=d_kv, bits=2, balance=1e9) == math.inf


def test_the_table():
    """Every row, written out for 1,000 tokens."""
    shape, n = {"length": 1000, "bits": 2, "weights": 0}, 1000
    d, k = 4096, 1024
    rows = {
        ("kv", d): (0, n * d / 2),
        ("kv", k): (0, n * k / 2),
        ("input", d): (4 * n * d * d, n * d / 4),
        ("latent", k): (4 * n * k * k, n * k / 2),
        ("cl", d): (4 * n * d * d + 2 * n * d, n * d / 4 + n * d / 2),
        ("cl", k): (8 * n * k * d, n * k / 2 + n * d / 2),
    }
    for (form, d_kv), (operations, moved) in rows.items():
        cost = rebuild_cost(form, d=d, d_kv=d_kv, **shape)
        assert (cost.operations, cost.moved) == (operations, moved)
        three = rebuild_cost(form, d=d, d_kv=d_kv, batch=3, **shape)
        assert (three.operations, three.moved) == (3 * operations, 3 * moved)
    shared = rebuild_cost("cl", d=d, d_kv=d, num_layers=32, **shape)
    assert shared.stored == n * d / 4 + n * d / 2 / 32
    assert weight_bytes("latent", d, k) - weight_bytes("kv", d, k) == 4 * k * k


def test_choices():
    heads = {"d": 4096, "d_kv": 4096, "balance": H100}
    groups = {"d": 4096, "d_kv": 1024, "balance": H100}
    # Short contexts hide behind the weights: whatever stores least. Long ones do not.
    assert choose_form(length=1000, **heads).form == "cl"
    assert choose_form(length=100_000, **heads).form == "kv"
    assert choose_form(length=100_000, slowdown=1000, **heads).form == "cl"
    no_cl = {form: bits for form, bits in SIMILAR_BITS.items() if form != "cl"}
    assert choose_form(length=1000, bits=no_cl, **heads).form == "input"
    assert choose_form(length=2000, batch=8, bits=no_cl, **heads).form == "kv"
    # Latents are as large as keys and values of equal bits, and worth it with fewer.
    fewer = {"kv": 3, "latent": 2}
    assert choose_form(length=20_000, bits=fewer, **groups).form == "latent"
    assert choose_form(length=200_000, bits=fewer, **groups).form == "kv"
    assert choose_form(length=20_000, bits={"kv": 3, "latent": 3}, **groups).form == "kv"


def test_the_choice_stores_least_of_what_is_fast_enough():
    for d_kv in (256, 1024, 4096):
        for length in (500, 5000, 50_000, 500_000):
            for balance in (50, 200, 1000):
                costs = {
                    form: rebuild_cost(form, d=4096, d_kv=d_kv, length=length, bits=bits)
                    for form, bits in SIMILAR_BITS.items()
                }
                limit = 1.5 * costs["kv"].time(balance)
                least = min(c.stored for c in costs.values() if c.time(balance) <= limit)
                made = choose_form(d=4096, d_kv=d_kv, length=length, balance=balance, slowdown=1.5)
                assert made.stored == least


@pytest.mark.parametrize("fields", [{"length": 0}, {"balance": 0}, {"slowdown": 0.5}])
def test_impossible_shapes_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        choose_form(**{"d": 64, "d_kv": 64, "length": 10, "balance": 1} | fields)
