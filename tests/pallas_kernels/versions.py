# SPDX-License-Identifier: Apache-2.0
"""What the interpreters of older versions of jax cannot do; the kernels themselves run there."""

import jax
import pytest

interprets_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="jax 0.11.1 fails to interpret loads of GPU kernels"
)
detects_races = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="interpreters before jax 0.12 detect fewer races"
)
