# SPDX-License-Identifier: Apache-2.0
"""The two products of attention against float64, in every form that shapes and types choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products
from tests.tolerances import CHUNKED, KERNEL_ATOL

WIDTH = 8
KEYS = [16, products._MANY, 2 * products._MANY, products._MOST]
ROWS = [1, 4, products._FEW, products._FEW + 1]


def operands(rows, keys, dtype):
    rng = np.random.default_rng(rows + keys)
    shapes = (1, 2, rows, WIDTH), (1, 2, keys, WIDTH), (1, 2, rows, keys)
    q, k, weights = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, weights / keys**0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", ROWS)
def test_products_equal_float64(rows, keys, dtype):
    q, k, weights = operands(rows, keys, dtype)
    wide = [np.asarray(x, np.float64) for x in (q, k, weights)]
    scores = jax.jit(products.score_keys)(q, k)
    assert scores.dtype == jnp.float32
    expected = np.einsum("bkrh,bksh->bkrs", wide[0], wide[1])
    np.testing.assert_allclose(scores, expected, atol=KERNEL_ATOL["float32"])
    sums = jax.jit(products.weigh_values)(weights, k)
    assert sums.dtype == jnp.float32
    expected = np.einsum("bkrs,bksh->bkrh", wide[2], wide[1])
    np.testing.assert_allclose(sums, expected, atol=CHUNKED["float32"])


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_loop_writes_no_product_out(rows):
    """Nothing as large as the keys is made next to them."""
    q, k, weights = operands(rows, products._MOST, "float32")
    for function, left in ((products.score_keys, q), (products.weigh_values, weights)):
        sizes = jax.jit(function).lower(left, k).compile().memory_analysis()
        assert sizes.temp_size_in_bytes < k.nbytes / 2
