# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernel over packed tokens can do, and in which sizes."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.common import Target, check, round_up
from pallas_kernels.packing import words_of
from pallas_kernels.qtensor import QTensor
from pallas_kernels.quantized_decode_attention import gpu_elements as elements
from pallas_kernels.quantized_decode_attention import gpu_tiles as tiles
from pallas_kernels.quantized_decode_attention.form import Form

SHARED_BYTES = 227 * 1024
_OWN_BYTES = 1041
"""What Mosaic takes for itself, as compiled kernels show."""
_ROW_TILES = (8, 16)
_CORES = 132
_TOKENS, _WIDTH = tiles.TOKENS, tiles.WIDTH


@dataclass(frozen=True)
class Config:
    """Sizes: `block_kv` slots per step, a multiple of 64; steps in flight; blocks per sequence."""

    block_kv: int = 128
    stages: int = 3
    splits: int = 1

    def __post_init__(self) -> None:
        rule = f"must be a positive multiple of {_TOKENS}"
        good = self.block_kv > 0 and self.block_kv % _TOKENS == 0
        check("block_kv", self.block_kv, good, rule)
        check("stages", self.stages, self.stages >= 1, "must be >= 1")
        check("splits", self.splits, self.splits >= 1, "must be >= 1")


@dataclass(frozen=True)
class Plan:
    """Everything static that the kernel's steps need."""

    config: Config
    slots: int
    rows: int  # of one tile of query rows
    k: Form
    v: Form
    rotated: bool  # keys are stored before rotation
    scale: float
    softcap: float | None
    interpret: Any

    @property
    def whole_keys(self) -> bool:
        """Whether keys are decoded to the numbers they stand for; else they stay digits."""
        return whole(self.k, self.rotated)

    @property
    def whole_values(self) -> bool:
        """Whether values are."""
        return whole(self.v)

    @property
    def key_dtype(self) -> Any:
        """Type in which queries and keys are multiplied."""
        return jnp.float16 if self.whole_keys else jnp.bfloat16

    @property
    def value_dtype(self) -> Any:
        """Type in which weights and values are multiplied."""
        return jnp.float16 if self.whole_values else jnp.bfloat16

    @property
    def key_parts(self) -> int:
        """Products of a tile of keys: one per scale of a token, or per group of the tile.

        Around the newest slot of a ring positions fall back, so rotated keys take two.
        """
        if self.whole_keys:
            return 1 + self.rotated
        return max(_TOKENS // self.k.tokens, 1) if self.k.sharing == "channel" else self.k.groups

    @property
    def value_parts(self) -> int:
        """Products of a tile of values: one per scale of a token."""
        return 1 if self.whole_values else self.v.groups

    @property
    def groups(self) -> int:
        """Groups of a block that share scales of keys per channel."""
        return self.config.block_kv // self.k.tokens

    @property
    def with_offsets(self) -> bool:
        """Whether scaled queries come with a second part that offsets and biases make."""
        return self.k.offset or self.k.bias != 0 or self.k.bits == 8

    @property
    def scaled_queries(self) -> bool:
        """Whether the queries of a block are multiplied by scales of its keys."""
        return not self.whole_keys and self.k.sharing == "channel"

    @property
    def query_parts(self) -> int:
        """Matrices of queries in shared memory."""
        if self.scaled_queries:
            return self.groups * (1 + self.with_offsets)
        return self.key_parts * (self.tiles if self.rotated else 1)

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return self.config.block_kv // _TOKENS


def whole(form: Form, rotated: bool = False) -> bool:
    """Return whether tokens are decoded to numbers, which codes of uniform levels need not be."""
    return rotated or not form.uniform


def default_config(batch: int, kv_heads: int, row_tiles: int, plan: Plan, target: Target) -> Config:
    """Return sizes derived from shapes: two waves of three resident blocks, enough to a split.

    Two tiles to a step share its fixed work, unless several products of each fill the registers.
    """
    k, v, slots = plan.k, plan.v, plan.slots
    single = k.groups == v.groups == 1 and (k.sharing != "channel" or k.tokens >= _TOKENS)
    single &= not (plan.whole_keys or plan.whole_values)
    block_kv = 128 if slots >= 128 and (single or k.tokens > _TOKENS) else 64
    wanted = -(-6 * (target.cores or _CORES) // (batch * kv_heads * row_tiles))
    # Three blocks of 8-bit codes would not fit a multiprocessor otherwise.
    stages = 2 if k.bits + v.bits >= 16 else 3
    return Config(block_kv, stages, max(1, min(wanted, slots // 512)))


def row_tile(rows: int, k: Form, v: Form, rotated: bool) -> int:
    """Return how many query rows one block takes; with more, registers would spill."""
    single = k.sharing != "channel" and max(k.groups, v.groups) == 1 and not rotated
    most = 16 if single else 8
    return next(tile for tile in _ROW_TILES if tile >= min(rows, most))


def shared_bytes(plan: Plan) -> int:
    """Return the shared memory of one block; each buffer begins at a multiple of 1,024 bytes."""
    config, tile = plan.config, plan.rows
    ring = _block_bytes(plan, plan.k, plan.whole_keys)
    ring += _block_bytes(plan, plan.v, plan.whole_values)
    queries = 2 * tile * _WIDTH * plan.query_parts
    weights = 2 * tile * _TOKENS * plan.tiles * plan.value_parts
    sizes = [queries, weights, 4 * tile * _WIDTH, 4 * tile, 8 * tile, 24 * config.stages + 8]
    sizes += [32] * (plan.whole_keys + plan.whole_values)
    if plan.whole_keys and plan.k.sharing == "static":
        sizes.append(4 * _WIDTH)
    if plan.rotated:
        ring.append(4 * _WIDTH * plan.tiles)
        sizes.append(2 * _TOKENS * _WIDTH)
    sizes += [config.stages * size for size in ring]
    return sum(round_up(size, 1024) for size in sizes) + _OWN_BYTES


def _block_bytes(plan: Plan, form: Form, whole_: bool) -> list[int]:
    """Return the bytes of each array of one block of keys or values."""
    block = plan.config.block_kv
    count = {"token": block * form.groups, "channel": block // form.tokens * _WIDTH, "static": 0}
    sizes = [block * 4 * words_of(_WIDTH, form.bits)]
    sizes += [2 * count[form.sharing]] * (1 + form.offset)
    if whole_:
        sizes += [2 * block * form.slots, round_up(block * form.slots, 128)]
    return sizes


def check_supported(q: Array, k: QTensor, v: QTensor, plan: Plan, target: Target) -> None:
    """Raise NotImplementedError for what the kernel cannot do on this device."""
    hopper = target.platform == "gpu" and target.capability == (9, 0)
    _need(bool(plan.interpret) or hopper, "needs a Hopper GPU (compute capability 9.0)")
    _need(q.dtype == jnp.bfloat16, f"serves bfloat16 queries, not {q.dtype}")
    _need(q.shape[-1] == _WIDTH, f"head width {q.shape[-1]} is not {_WIDTH}")
    slots, least = plan.slots, plan.config.block_kv
    good = slots % _TOKENS == 0 and slots >= least
    _need(good, f"{slots} slots are no multiple of 64 >= {least}")
    for tensor, form, whole_ in ((k, plan.k, plan.whole_keys), (v, plan.v, plan.whole_values)):
        _need(form.groups <= 4, f"{form.groups} scales for a token are left to XLA")
        if whole_:
            _check_elements(tensor, form)
        else:
            _check_digits(tensor, form)
    _need(plan.v.sharing != "channel", "values with a scale per channel and group are left to XLA")
    rule = "numbers of values with a fixed scale are left to XLA"
    _need(not plan.whole_values or plan.v.sharing == "token", rule)
    if plan.scaled_queries:
        tokens = plan.k.tokens
        fits = least % tokens == 0 and (_TOKENS % tokens == 0 or tokens == 2 * _TOKENS)
        _need(fits, f"keys in groups of {tokens} tokens do not fit blocks of {least}")


def _check_digits(tensor: QTensor, form: Form) -> None:
    _need(form.bits in tiles.BASE, f"has no codes of {form.bits} bits")
    types = {x.dtype for x in (tensor.scale, tensor.offset) if x is not None}
    plain = form.sharing == "static" or jnp.dtype(jnp.float32) not in types
    _need(plain, "scales must have 16 bits")


def _check_elements(tensor: QTensor, form: Form) -> None:
    what = "tables, exact entries or keys before rotation"
    _need(form.bits in elements.BITS, f"has no {what} of {form.bits} bits")
    _need(form.sharing != "channel", f"{what} with scales per group of tokens are left to XLA")
    most = elements.MOST_SLOTS
    _need(form.slots <= most, f"{form.slots} exact entries for a token, more than {most}")
    one = tensor.table is None or tensor.table.size == 1 << form.bits
    _need(one, "a table of its own for each head or sequence is left to XLA")
    stored = [tensor.residual]
    stored += [tensor.scale, tensor.offset] if form.sharing == "token" else []
    types = {str(x.dtype) for x in stored if x is not None}
    _need(types <= {"float16"}, f"scales and residuals beside {what} must be float16")
    places = tensor.place is None or tensor.place.dtype == jnp.uint8
    _need(places, "places of exact entries must be uint8")


def _need(good: bool, what: str) -> None:
    if not good:
        raise NotImplementedError(f"mosaic_gpu: {what}")
