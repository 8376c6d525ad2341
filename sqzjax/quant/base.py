# SPDX-License-Identifier: Apache-2.0
"""The quantizer seam: a frozen policy that turns arrays into `QTensor`s.

To add one, write a class with `encode`, extend the union in `sqzjax.quant` and the list of the
contract suite. How codes are stored and read back is the business of `pallas_kernels.qtensor`.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.qtensor import QTensor, dequantize
from sqzjax.checks import check_literals
from sqzjax.typing import Array, Float, PyTree


class Quantizer(ABC):
    """How the rows (tokens) and columns (channels) of a tensor are coded."""

    def __post_init__(self) -> None:
        check_literals(self)

    @property
    def token_group(self) -> int:
        """Tokens that are coded together, 1 if each stands alone."""
        return 1

    @abstractmethod
    def check(self, width: int) -> None:
        """Raise ValueError if tensors of `width` columns cannot be coded."""

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a tensor of `shape` cannot be coded; every `encode` begins so."""
        group = self.token_group
        if len(shape) < 2 or shape[-2] % group:
            raise ValueError(
                f"a tensor of shape {list(shape)} must end in rows and columns, the rows a "
                f"multiple of {group}, which are coded together; pad or reshape it"
            )
        self.check(shape[-1])

    @abstractmethod
    def encode(self, x: Float[Array, "... S H"], fitted: PyTree = None) -> QTensor:
        """Return `x` packed; S a multiple of `token_group`. `fitted`: arrays of a calibration."""

    def static(self, fitted: PyTree = None) -> dict[str, Array]:
        """Return the fields of `encode`'s tensors that are the same whatever the elements.

        A cache keeps none of them: it drops them with `strip` and reads through `complete`.
        """
        return {}

    def strip(self, tensor: QTensor, fitted: PyTree = None) -> QTensor:
        """Return a tensor of `encode` without its static fields."""
        return replace(tensor, **dict.fromkeys(self.static(fitted)))

    def complete(self, tensor: QTensor, fitted: PyTree = None) -> QTensor:
        """Return a stripped tensor with its static fields, leading axes of 1 in front."""
        axes = tensor.codes.ndim
        fields = self.static(fitted).items()
        return replace(
            tensor, **{name: jnp.expand_dims(a, range(axes - a.ndim)) for name, a in fields}
        )

    def decode(self, tensor: QTensor) -> Float[Array, "... S H"]:
        """Return the float32 elements of a small tensor."""
        return dequantize(tensor)

    def empty(self, shape: tuple[int, ...], fitted: PyTree = None) -> QTensor:
        """Return the tensor of zero codes for elements of `shape`, as `encode` would lay it out."""
        form = jax.eval_shape(self.encode, jax.ShapeDtypeStruct(shape, jnp.float32), fitted)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), form)
