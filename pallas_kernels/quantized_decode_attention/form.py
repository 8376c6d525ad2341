# SPDX-License-Identifier: Apache-2.0
"""What a kernel must know of a `QTensor` when it is traced, and how planar words are laid out."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.packing import PLANES
from pallas_kernels.qtensor import QTensor

BASE = 128
"""A 16-bit pattern 0x4300 | digit is the bfloat16 `128 + digit`, for digits of up to 7 bits."""
FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Form:
    """The static side of a packed tensor of keys or values.

    `sharing` says whom a scale serves: "token", H / `groups` channels of one token; "channel", one
    channel of `tokens` consecutive tokens; "static", one channel, or all, of all tokens.
    """

    bits: int
    width: int
    bias: int
    sharing: Literal["token", "channel", "static"]
    groups: int  # of channels in a token; 1 unless sharing is "token"
    tokens: int  # that share a scale; 1 unless sharing is "channel"
    offset: bool
    table: bool
    slots: int  # of exact entries in a row

    @property
    def uniform(self) -> bool:
        """Whether an element is a code times a scale plus an offset, and nothing else."""
        return not self.table and not self.slots


def form_of(tensor: QTensor, name: str) -> Form:
    """Return the form of a tensor; NotImplementedError (of backend `name`) if it has none."""

    def need(good: bool, what: str) -> None:
        if not good:
            raise NotImplementedError(f"{name}: {what}")

    rows, width = tensor.codes.shape[-2], tensor.width
    need(tensor.codes.dtype == jnp.uint32, f"codes of {tensor.codes.dtype} are left to XLA")
    down, across = tensor.scale.shape[-2:]
    same = tensor.offset is None or tensor.offset.shape[-2:] == (down, across)
    need(same, "scales and offsets must be shared alike")
    types = [str(x.dtype) for x in (tensor.scale, tensor.offset, tensor.residual) if x is not None]
    need(set(types) <= set(FLOATS), f"no scales or residuals of {', '.join(types)}")
    sharing, groups, tokens = "static", 1, 1
    if down == rows and rows > 1:
        sharing, groups = "token", across
    elif down > 1:
        sharing, tokens = "channel", rows // down
    fits = across == width or (sharing == "static" and across == 1) or sharing == "token"
    need(fits, f"{across} scales for {width} channels of {tokens} tokens are left to XLA")
    slots = 0 if tensor.residual is None else tensor.residual.shape[-1]
    return Form(
        tensor.bits,
        width,
        tensor.bias,
        sharing,
        groups,
        tokens,
        tensor.offset is not None,
        tensor.table is not None,
        slots,
    )


def copies(words: int) -> int:
    """Return how often a plane's words are repeated, shifted, to fill the 8 rows of a register."""
    if words % 8 and 8 % words:
        raise NotImplementedError(f"a plane of {words} words does not fill registers")
    return max(8 // words, 1)


def plane_words(width: int, bits: int) -> list[tuple[int, int, int]]:
    """Return (bits, words, shift) of each plane of a row of codes."""
    shifts = np.cumsum((0, *PLANES[bits]))
    return [(p, width * p // 32, int(s)) for p, s in zip(PLANES[bits], shifts)]


def digit_order(width: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the channel and the weight of each row that `tpu_tiles.digits` makes.

    A digit is a field of up to 4 bits; two digits, 16 bits apart in a word, come at a time and lie
    in neighbouring rows.
    """
    channels, weights = [], []
    for plane, words, shift in plane_words(width, bits):
        many = copies(words)
        copy, word = np.divmod(np.arange(many * words), words)
        for offset in range(0, 16, plane * many):
            field = offset // plane + copy
            pair = np.stack([word + words * field, word + words * (field + 16 // plane)], axis=1)
            for part in range(0, plane, 4):
                channels.append(pair.reshape(-1))
                weights.append(np.full(pair.size, 1 << (shift + part)))
    return np.concatenate(channels), np.concatenate(weights)


def spread_digits(x: Array, width: int, bits: int) -> Array:
    """Return `x` `[..., H]` as factors of digits `[..., P]`, in their order, times their weights.

    Weights are powers of two: nothing is rounded.
    """
    channels, weights = digit_order(width, bits)
    return x[..., channels] * weights.astype(x.dtype)


def gather_digits(x: Array, width: int, bits: int) -> Array:
    """Return sums over digits `[..., P]` as those over codes `[..., H]`."""
    channels, weights = digit_order(width, bits)
    order = np.argsort(channels, kind="stable")
    x = x[..., order] * weights[order].astype(np.float32)
    return x.reshape(*x.shape[:-1], width, -1).sum(-1)


def digit_base(dtype: Any) -> int:
    """Return what is left on the digits that are multiplied in a type: float32 has room for none.

    Sums of it cancel; in float32 that would cost the digits that one asks for.
    """
    return 0 if dtype == jnp.float32 else BASE


def zero_level(form: Form, dtype: Any) -> int:
    """Return how much digits of a code, base and all, exceed its level: the code less the bias."""
    _, weights = digit_order(form.width, form.bits)
    return digit_base(dtype) * int(weights.sum()) // form.width + form.bias


def group_masks(form: Form) -> np.ndarray:
    """Return which channels `[C, H]` each of a token's scales serves."""
    group = np.arange(form.width) // (form.width // form.groups)
    return group == np.arange(form.groups)[:, None]


def stored(x: Array) -> Array:
    """Return float16 numbers as the integers of their bits; other types as they are.

    TPUs have no float16, and a conversion outside the kernel would copy the cache.
    """
    return x.view(jnp.uint16) if x.dtype == jnp.float16 else x


def floats(x: Any) -> Any:
    """Return numbers that `stored` handed over as float32."""
    if x.dtype != jnp.uint16:
        return x.astype(jnp.float32)
    x = x.astype(jnp.int32)
    size = x & 0x7FFF
    normal = lax.bitcast_convert_type((size << 13) + (112 << 23), jnp.float32)
    # Subnormal numbers are flushed to zero by the device unless they are made of integers.
    value = jnp.where(size < 1 << 10, size.astype(jnp.float32) * 2.0**-24, normal)
    return jnp.where(x > 0x7FFF, -value, value)
