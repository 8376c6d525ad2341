# SPDX-License-Identifier: Apache-2.0
"""What generation returns: tokens, why they ended, and what it cost."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class GenerateStats:
    """Cost of one call. The first call with new shapes includes compilation: warm up to measure.

    `ttft_seconds` runs from the call to the first token on the host (checks, padding and prefill
    included), `prefill_seconds` covers the device's part of it, `decode_seconds` everything after.
    `extra` holds what the decoder reports (speculative acceptance and the like).
    """

    prompt_tokens: int
    new_tokens: int
    rows: int
    steps: int
    prefill_seconds: float
    ttft_seconds: float
    decode_seconds: float
    cache_bytes: int
    extra: dict[str, float | int] = field(default_factory=dict)

    @property
    def tpot_seconds(self) -> float:
        """Mean time per output token of a row after its first, in lockstep decoding per step."""
        return self.decode_seconds / max(self.steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding, those of the prefill not counted."""
        decoded = max(self.new_tokens - self.rows, 0)
        return decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that one step adds to the batch; more than its rows only by speculation."""
        return max(self.new_tokens - self.rows, 0) / max(self.steps, 1)


@dataclass(frozen=True, kw_only=True)
class GenerateOutput:
    """New tokens of R rows: prompts in order, the samples of one prompt next to each other.

    `tokens` int32 `[R, T]`, T the longest row, `pad_token_id` from each row's length on; a stop id
    that ended a row is included. `finish_reason` per row is "stop" or "length". `text` (with a
    tokenizer) ends before a stop id or stop string. `logprobs` float32 `[R, T]`, 0 beyond the
    length, under the raw model distribution (see `SamplingConfig`).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reason: tuple[str, ...]
    text: tuple[str, ...] | None
    logprobs: np.ndarray | None
    stats: GenerateStats

    def row(self, index: int) -> list[int]:
        """Return the tokens of one row without padding."""
        return self.tokens[index, : self.lengths[index]].tolist()


@dataclass(frozen=True)
class RowUpdate:
    """What one row gained since the last update; `finish_reason` is set in its last one.

    `text` can lag behind `tokens`: incomplete characters and possible stop strings are held back.
    """

    row: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None
