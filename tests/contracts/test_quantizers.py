# SPDX-License-Identifier: Apache-2.0
"""The contract that every quantizer of `quantizers.CASES` passes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.qtensor import QTensor, levels, stretch, validate
from sqzjax.quant import dequantize
from tests.contracts.quantizers import CASES, HEADS, ROWS, WIDTH
from tests.tolerances import HALF_ROUNDING, HALF_STEP, SMALL_SCALES_REL

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _elements(seed=0):
    x = np.random.default_rng(seed).normal(size=(5, HEADS, ROWS, WIDTH))
    return np.clip(x, -4, 4).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def _run(quantizer, x, fitted):
    return quantizer.encode(x, fitted)


def _encode(case, x, bits=None):
    return _run(case.quantizer if bits is None else case.make(bits), x, case.fitted)


def _decoded(case, x, bits=None):
    return _read(_encode(case, x, bits))[0]


@jax.jit
def _parts(tensor):
    """What a tensor stands for, its levels and its scales of every element."""
    scale = stretch(tensor.scale.astype(jnp.float32), ROWS, WIDTH)
    return dequantize(tensor), levels(tensor), scale


def _read(tensor):
    return [np.asarray(part, np.float32) for part in _parts(tensor)]


def _half_gap(tensor: QTensor) -> np.ndarray:
    """Half the distance between the levels around each element, in its own units."""
    _, level, scale = _read(tensor)
    if tensor.codes.dtype != jnp.uint32:
        finfo = jnp.finfo(tensor.codes.dtype)
        size = np.maximum(np.abs(level), float(finfo.smallest_normal))
        return np.exp2(np.floor(np.log2(size))) * float(finfo.eps) / 2
    table = np.arange(2.0**tensor.bits) if tensor.table is None else np.asarray(tensor.table)
    gap = np.diff(table.reshape(-1)).max()
    return scale * gap / 2


def test_errors_are_at_most_half_a_gap(case):
    x = _elements()
    for bits in case.bits:
        tensor = _encode(case, x, bits)
        error = np.abs(_read(tensor)[0] - x)
        assert np.all(error <= _half_gap(tensor) * (1 + HALF_STEP) + HALF_STEP)
        assert error.max() > 0


def test_errors_are_at_most_half_a_gap_far_from_zero(case):
    """Offsets are float16, whose steps are coarse there: the scale covers what they miss."""
    if case.fitted is not None or case.name.startswith(("float8", "symmetric")):
        pytest.skip("has no offset that follows the elements")
    for shift in (300.3, -300.3):
        x = _elements() + np.float32(shift)
        for bits in {case.bits[0], case.bits[-1]}:
            tensor = _encode(case, x, bits)
            error = np.abs(_read(tensor)[0] - x)
            assert np.all(error <= _half_gap(tensor) * (1 + HALF_STEP))


def test_more_bits_are_closer(case):
    x = _elements()
    errors = [float(np.mean((_decoded(case, x, bits) - x) ** 2)) for bits in case.bits]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


def test_tokens_alone_are_coded_as_together(case):
    x, group = _elements(), case.quantizer.token_group
    whole = _encode(case, x)
    parts = [_encode(case, x[:, :, i : i + group]) for i in range(0, ROWS, group)]
    for name in ("codes", "scale", "offset", "residual", "place", "table"):
        leaf = getattr(whole, name)
        if leaf is None:
            continue
        pieces = [getattr(part, name) for part in parts]
        static = leaf.shape[-2] == 1
        joined = pieces[0] if static else np.concatenate([np.asarray(p) for p in pieces], axis=2)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(joined), err_msg=name)


def test_vmap_agrees_with_the_whole(case):
    x = _elements()

    @jax.jit
    @jax.vmap
    def mapped(row):
        return dequantize(case.quantizer.encode(row, case.fitted))

    np.testing.assert_array_equal(mapped(x), _decoded(case, x))


def test_tensors_are_valid_and_empty_ones_look_alike(case):
    x = _elements()
    tensor = _encode(case, x)
    validate(tensor)
    case.quantizer.check(WIDTH)
    empty = case.quantizer.empty(x.shape, case.fitted)
    assert jax.tree.structure(empty) == jax.tree.structure(tensor)
    for one, other in zip(jax.tree.leaves(empty), jax.tree.leaves(tensor)):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert not np.any(np.asarray(one, np.float32))
    assert tensor.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tensor))


def test_static_fields_can_be_dropped_and_put_back(case):
    tensor = _encode(case, _elements())
    stripped = case.quantizer.strip(tensor, case.fitted)
    names = set(case.quantizer.static(case.fitted))
    assert all(getattr(stripped, name) is None for name in names)
    whole = case.quantizer.complete(stripped, case.fitted)
    assert jax.tree.structure(whole) == jax.tree.structure(tensor)
    jax.tree.map(np.testing.assert_array_equal, whole, tensor)


def test_constant_rows_are_finite_and_close(case):
    values = np.array([0.0, 1.0, -3.7, -1e-30, 1e4], np.float32)
    x = np.broadcast_to(values[:, None, None, None], (5, HEADS, ROWS, WIDTH))
    for bits in {case.bits[0], case.bits[-1]}:
        out = _decoded(case, x, bits)
        assert np.all(np.isfinite(out))
        near = np.abs(out - x)[:4]  # the last is beyond what fixed scales reach
        assert near.max() <= 4 * 2.0 ** -min(case.bits[0], 4)


@pytest.mark.parametrize("size", [7e4, 1e6, 3e38])
def test_finite_numbers_stay_finite(case, size):
    """Scales, offsets and residuals are float16, beyond which they saturate."""
    x, sign = _elements(), np.where(np.arange(ROWS) % 2, 1.0, -1.0)[:, None]
    parts = [
        x * np.float32(size / 4),
        np.where(np.arange(WIDTH) == 3, sign * size, x),
        np.broadcast_to(sign * size, x.shape),
    ]
    for part in parts:
        part = part.astype(np.float32)
        for bits in {case.bits[0], case.bits[-1]}:
            tensor = _encode(case, part, bits)
            assert all(np.all(np.isfinite(np.float32(leaf))) for leaf in jax.tree.leaves(tensor))
            out = _read(tensor)[0]
            assert np.all(np.isfinite(out))
            assert np.all(np.abs(out) <= np.abs(part).max() * (1 + HALF_STEP) + 100)


def test_powers_of_two_change_nothing_but_the_scale(case):
    if case.fitted is not None or case.name.startswith("float8"):
        pytest.skip("its scale is given")
    x = _elements()

    def error(exponent):
        factor = np.float32(2.0**exponent)
        return float(np.sqrt(np.mean((_decoded(case, x * factor) / factor - x) ** 2)))

    expected = error(0)
    for exponent in (-14, -12, -6, 8):
        assert error(exponent) == pytest.approx(expected, rel=SMALL_SCALES_REL), exponent


def test_equal_elements_come_back_as_one_float16(case):
    if case.fitted is not None or case.name.startswith("float8"):
        pytest.skip("its scale is given")
    values = np.array([1000.3, -0.1, 3.7e-3, 60001.0, 0.0], np.float32)
    x = np.broadcast_to(values[:, None, None, None], (5, HEADS, ROWS, WIDTH))
    np.testing.assert_allclose(_decoded(case, x), x, rtol=HALF_ROUNDING)
