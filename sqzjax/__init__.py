# SPDX-License-Identifier: Apache-2.0
"""Large models made cheap to run and to train, in JAX.

Nothing is imported here: `import sqzjax` costs nothing, and each subpackage is a facade of its own
(`sqzjax.models`, `sqzjax.kvcache`, `sqzjax.decode`, `sqzjax.io`, `sqzjax.analysis`).
"""

__version__ = "0.1.0"
