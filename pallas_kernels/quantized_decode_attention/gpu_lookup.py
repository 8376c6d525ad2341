# SPDX-License-Identifier: Apache-2.0
"""Decoding packed tokens to float16 numbers in registers of a Hopper warpgroup, see `gpu_elements`.

A table of up to 16 levels lies in a few registers, as low bytes and as high bytes; `prmt` looks up
four codes at a time. All that follows works on pairs: scale and offset by one multiply-add, an
exact entry by a comparison of its place with two channels and a multiply-add, a rotation by two of
them per pair. That makes 4 to 5 instructions per element of a key and 3 to 4 of a value.

A pair of keys are two channels 16 apart; those 64 further on are a register of the same thread, so
that a rotation stays within it. A pair of values are two tokens of one channel.
"""

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jaxlib.mlir import ir

from pallas_kernels.packing import words_of
from pallas_kernels.quantized_decode_attention import gpu_registers as reg
from pallas_kernels.quantized_decode_attention.form import Form
from pallas_kernels.quantized_decode_attention.gpu_tiles import TOKENS, WIDTH

_HALF = WIDTH // 2
_EVEN, _LOW = 0x33333333, 0x77777777
_NUMBERS = 0x6400
"""The pattern 0x6400 + n is the float16 1024 + n, for n of up to 10 bits."""
_JOINED = (0x5140, 0x7362)
"""Bytes of levels 0 and 1, and of levels 2 and 3, out of their low and their high bytes."""
_ALTERNATE = (0x6240, 0x7351)
"""Bytes of levels 0 and 2, and of levels 1 and 3."""


def key_order(bits: int) -> np.ndarray:
    """Return the channel of each column of `keys`; column c + 64 holds the partner of column c."""
    return in_key_order(np.arange(WIDTH), bits)


def value_order(bits: int) -> np.ndarray:
    """Return the channel of each row of `values`."""
    return in_value_order(np.arange(WIDTH), bits)


def in_key_order(x: Any, bits: int) -> Any:
    """Return `x` `[..., 128]`, given by channel, in the order of the columns of `keys`.

    Channel w + 16 n + 64 h is digit n in half h of word w of 4 bits; of fewer bits, words w and
    w + 8 are one, its even and its odd digits.
    """
    *lead, _ = x.shape
    if bits == 4:  # half, pair, of the pair, lane % 4, word
        x, order = x.reshape(-1, 2, 2, 2, 4, 4), (0, 1, 5, 2, 4, 3)
    else:  # half, pair, of the pair, odd, lane % 4, word
        x, order = x.reshape(-1, 2, 2, 2, 2, 4, 2), (0, 1, 6, 4, 2, 5, 3)
    return x.transpose(order).reshape(*lead, WIDTH)


def in_value_order(x: Any, bits: int) -> Any:
    """Return `x` `[..., 128]`, given by channel, in the order of the rows of `values`."""
    *lead, _ = x.shape
    if bits == 4:  # half, two axes of digits, warp, word
        x, order = x.reshape(-1, 2, 2, 2, 4, 4), (0, 2, 4, 3, 5, 1)
    else:  # half, two axes of digits, odd, block of words, word
        x, order = x.reshape(-1, 2, 2, 2, 2, 2, 4), (0, 2, 5, 4, 3, 6, 1)
    return x.transpose(order).reshape(*lead, WIDTH)


def keys(form: Form, refs: dict[str, Any]):
    """Return tokens `[64, 128]` as an operand of wgmma; `refs` as in `gpu_elements.keys`."""
    warp, group, q = reg.thread()
    table = _Table.of(form.bits, refs["table"])
    registers = np.empty((2, 8, 2), dtype=object)  # half, place, token
    for k in range(2):
        token = reg.add(reg.add(reg.mul(warp, 16), group), 8 * k)
        for word, selectors in enumerate(_key_selectors(form.bits, refs["codes"], token, q)):
            for half in range(2):
                first = 2 * word
                registers[half, first : first + 2, k] = table.look_up(selectors, half, _JOINED)
        factors = _key_factors(form, refs, token, q)
        slots = _key_slots(form, refs, token, q)
        for place in range(8):
            pair = registers[:, place, k]
            for half in range(2):
                pair[half] = _fma(pair[half], *factors[half][place])
                channel = _first_lane_channels(form.bits)[half, place]
                pair[half] = _with_slots(pair[half], slots, *channel)
        if "spins" in refs:
            _rotate(registers[:, :, k], refs["spins"], token, q)
    return _fragment(registers.reshape(1, 16, 2), (TOKENS, WIDTH))


def _first_lane_channels(bits: int) -> np.ndarray:
    """Return the channels of a thread with lane % 4 = 0, `[half, place, of the pair]`."""
    return key_order(bits).reshape(2, 8, 4, 2)[:, :, 0]


def _key_selectors(bits: int, ref, token, q):
    """Return what chooses the levels of a thread's four words of codes, see `_selectors`."""
    row = reg.mul(token, 4 * words_of(WIDTH, bits))
    if bits == 4:
        words = reg.load_words(ref, reg.add(row, reg.mul(q, 16)), 4)
        return [_selectors(word) for word in words]
    pair = reg.load_words(ref, reg.add(row, reg.mul(q, 8)), 2)
    tops = [None, None]
    if bits == 3:
        here = reg.add(row, reg.add(reg.mul(reg.band(q, 1), 8), 32))
        tops = [reg.shr(x, reg.shr(q, 1)) for x in reg.load_words(ref, here, 2)]
    found = []
    for word, top in zip(pair, tops):
        top = None if top is None else reg.band(top, 0x55555555)
        for odd in range(2):
            bits_of = None if top is None else top if odd else reg.shl(top, 2)
            found.append(_narrow_selectors(reg.shr(word, 2 * odd), bits_of))
    return found


def _selectors(word):
    """Return the digits of a word less their highest bit, and which half of a table each is in."""
    half = reg.logic(reg.shr(word, 1), 0x44444444, 0x32103210, "0xEA")
    return reg.band(word, _LOW), half


def _narrow_selectors(word, top):
    """Return digits of 2 bits, or of 3 where `top` holds the third one of each."""
    chosen = reg.band(word, _EVEN) if top is None else reg.logic(word, top, _EVEN, "0xE4")
    return chosen, None


def _key_factors(form: Form, refs: dict[str, Any], token, q) -> list[list[tuple[Any, Any]]]:
    """Return scale and offset of each pair of a thread, `[half][place]`."""
    if "factors" in refs:
        loaded = [
            reg.load_words(refs["factors"], reg.add(reg.mul(q, 16), 64 * place), 4)
            for place in range(8)
        ]
        return [[(x[2 * half], x[2 * half + 1]) for x in loaded] for half in range(2)]
    scale, offset = (
        [_same(refs.get(name), form.groups, token, group) for group in range(form.groups)]
        for name in ("scale", "offset")
    )
    each = list(zip(scale, offset))
    # Both channels of a pair lie in the same 32.
    return [
        [each[(2 * half + place % 2) * form.groups // 4] for place in range(8)] for half in range(2)
    ]


def _same(ref, stride: int, token, index: int):
    """Return entry `index` of a token's `stride` in both halves; zero where there is no array."""
    if ref is None:
        return 0
    value = reg.load(ref, reg.mul(reg.add(reg.mul(token, stride), index), 2), 16)
    return reg.permute(value, 0, 0x1010)


def _key_slots(form: Form, refs: dict[str, Any], token, q) -> list[tuple[Any, Any]]:
    """Return place and residual of each exact entry of a token.

    Places are less the channels by which this thread's differ from the first lane's.
    """
    found, past = [], reg.mul(q, reg.twice(4 if form.bits == 4 else 2))
    for slot in range(form.slots):
        place = reg.load(refs["place"], reg.add(reg.mul(token, form.slots), slot), 8)
        place = reg.permute(place, _NUMBERS >> 8, 0x4040)
        residual = _same(refs["residual"], form.slots, token, slot)
        found.append((reg.sub(place, past), residual))
    return found


def _with_slots(pair, slots, low, high):
    """Return a pair of channels plus the residuals whose place is theirs."""
    channels = int(_NUMBERS + low) | int(_NUMBERS + high) << 16
    for place, residual in slots:
        hit = reg.assembly("set.eq.f16x2.f16x2 $0, $1, $2;", place, channels)
        pair = _fma(hit, residual, pair)
    return pair


def _rotate(registers: np.ndarray, ref, token, q) -> None:
    """Turn a token's pairs `[half, place]` from the first slot of the tile to its own."""
    start = reg.add(reg.mul(token, 64), reg.mul(q, 16))
    for load in range(4):
        angles = reg.load_words(ref, reg.add(start, 64 * TOKENS * load), 4)
        for i in range(2):
            cos, sin = angles[2 * i], angles[2 * i + 1]
            x, y = registers[:, 2 * load + i]
            past = reg.assembly("neg.f16x2 $0, $1;", _product(y, sin))
            registers[0, 2 * load + i] = _fma(x, cos, past)
            registers[1, 2 * load + i] = _fma(y, cos, _product(x, sin))


def values(form: Form, refs: dict[str, Any]):
    """Return channels `[128, 64]` as an operand of wgmma; `refs` as in `gpu_elements.values`."""
    warp, group, q = reg.thread()
    table, bits = _Table.of(form.bits, refs["table"]), form.bits
    lane = reg.band(mgpu.utils.thread_idx(), 31)
    row = reg.mul(lane, 4 * words_of(WIDTH, bits))
    block, odd = (warp, 0) if bits == 4 else (reg.shr(warp, 1), reg.band(warp, 1))
    piece = reg.add(reg.mul(block, 8), group)
    base = reg.add(reg.shr(piece, 1), reg.mul(reg.band(piece, 1), _HALF))
    base = base if bits == 4 else reg.add(base, reg.mul(odd, 8))
    registers = np.empty((2, TOKENS // 8, 2), dtype=object)
    for part in range(TOKENS // 32):
        here = reg.add(row, 32 * part * 4 * words_of(WIDTH, bits))
        loaded = reg.load_transposed(refs["codes"], reg.add(here, reg.mul(block, 16)))
        tops: list[Any] = [None] * 4
        if bits == 3:
            past = reg.add(block, reg.mul(odd, 2))
            tops = [reg.shr(x, past) for x in reg.load_transposed(refs["codes"], reg.add(here, 32))]
        for c in range(4):
            first = reg.add(reg.mul(q, 2), 32 * part + 8 * c)
            selectors = _value_selectors(bits, loaded[c], odd, tops[c])
            slots = _value_slots(form, refs, first, base)
            for i in range(2):
                pairs = table.look_up(selectors, i, _ALTERNATE)
                factors = _value_factors(form, refs, first, piece, i)
                for k in range(2):
                    channel = 16 * (2 * i + k)
                    pair = _with_slots(_fma(pairs[k], *factors), slots, channel, channel)
                    registers[i, 4 * part + c, k] = pair
    return _fragment(registers, (WIDTH, TOKENS))


def _value_selectors(bits: int, word, odd, top):
    """Return what chooses the levels of a piece of two tokens, see `_selectors`.

    Bytes are reordered so that two channels of both tokens come first, then the other two.
    """
    if bits == 4:
        return _selectors(reg.permute(word, 0, 0x3120))
    word = reg.shr(word, reg.mul(odd, 2))
    top = None if top is None else reg.shl(reg.band(top, 0x11111111), 2)
    chosen, _ = _narrow_selectors(word, top)
    return reg.permute(chosen, 0, 0x3120), None


def _value_factors(form: Form, refs: dict[str, Any], first, piece, i: int) -> list[Any]:
    """Return scale and offset of tokens `first` and `first + 1` for rows of half `i`."""
    group: Any = 0
    if form.groups > 1:
        # Channels are 64 (piece % 2) + 32 i and what follows.
        group = reg.mul(reg.band(piece, 1), form.groups // 2)
        group = reg.add(group, i * form.groups // 4)
    return [_two(refs.get(name), form.groups, first, group, 16) for name in ("scale", "offset")]


def _two(ref, stride: int, first, index, bits: int):
    """Return the entries of two neighbouring tokens with `stride` each, in the halves of a word."""
    if ref is None:
        return 0
    size = bits // 8
    if stride == 1:
        both = reg.load(ref, reg.mul(first, size), 2 * bits)
        return both if bits == 16 else reg.permute(both, 0, 0x4140)
    start = reg.add(reg.mul(first, stride), index)
    low, high = (
        reg.load(ref, reg.mul(reg.add(start, token * stride), size), bits) for token in range(2)
    )
    return reg.permute(low, high, 0x5410)


def _value_slots(form: Form, refs: dict[str, Any], first, base) -> list[tuple[Any, Any]]:
    """Return place, less the channel `base`, and residual of the exact entries of two tokens."""
    found, past = [], reg.mul(base, reg.twice(1))
    for slot in range(form.slots):
        place = _two(refs["place"], form.slots, first, slot, 8)
        place = reg.sub(reg.add(place, reg.twice(_NUMBERS)), past)
        found.append((place, _two(refs["residual"], form.slots, first, slot, 16)))
    return found


class _Table:
    """The levels of codes in registers: low bytes, then high bytes, four to a register."""

    def __init__(self, words: list[Any]):
        self.halves = words[: len(words) // 2], words[len(words) // 2 :]

    @classmethod
    def of(cls, bits: int, ref) -> "_Table":
        words = reg.load_words(ref, reg.constant(0), 4)
        if bits == 4:
            words += reg.load_words(ref, reg.constant(16), 4)
        return cls(words[: 1 << (bits - 1)])

    def look_up(self, selectors, half: int, orders: tuple[int, int]) -> list[Any]:
        """Return two pairs of the levels of the four digits in the low or high half of a word."""
        chosen, upper = (None if x is None else reg.shr(x, 16 * half) for x in selectors)
        parts = [self._bytes(words, chosen, upper) for words in self.halves]
        return [reg.permute(parts[0], parts[1], order) for order in orders]

    @staticmethod
    def _bytes(words: list[Any], chosen, upper):
        if upper is None:
            return reg.permute(words[0], words[-1], chosen)
        low, high = (reg.permute(a, b, chosen) for a, b in (words[:2], words[2:]))
        return reg.permute(low, high, upper)


def _fma(a, b, c):
    return reg.assembly("fma.rn.f16x2 $0, $1, $2, $3;", a, b, c)


def _product(a, b):
    return reg.assembly("mul.rn.f16x2 $0, $1, $2;", a, b)


def _fragment(registers: np.ndarray, shape: tuple[int, int]):
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    floats = np.empty_like(registers)
    for at, value in np.ndenumerate(registers):
        floats[at] = mgpu.utils.bitcast(value, pair)
    return reg.fragment(floats, shape)
