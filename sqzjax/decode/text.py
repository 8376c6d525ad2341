# SPDX-License-Identifier: Apache-2.0
"""Turn a row's tokens into text as they arrive, and find stop strings across token boundaries.

Runs on the host; one `RowText` per row. Text that could still become a stop string, or whose bytes
are incomplete, is held back.
"""

from collections.abc import Sequence
from typing import Any

from sqzjax.io.tokenizer_base import IncrementalDecoder


class RowText:
    """Text of one row: `push` tokens, take the text that is certain, `finish` for the rest.

    Stop ids leave no text, and neither does a stop string: the text ends before it, while the
    token that completed it stays in `length`. Ids beyond the tokenizer's vocabulary (padding of
    the model's) are skipped.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        stop_ids: Sequence[int],
    ):
        self._size = getattr(tokenizer, "vocab_size", None)
        # A few tokens settle what the tokenizer does at the seam; decoding a long prompt is waste.
        context = [token for token in prompt[-8:] if self._known(token)]
        self._decoder = IncrementalDecoder(tokenizer, prompt=context)
        self._stop_strings, self._stop_ids = tuple(stop_strings), frozenset(stop_ids)
        self._held = ""
        self.length = 0
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; return new text. After a stop string the rest is ignored (`stopped`)."""
        ready = ""
        for token in tokens:
            if self.stopped:
                break
            self.length += 1
            if token not in self._stop_ids and self._known(token):
                ready += self._add(self._decoder.push(token))
        return ready

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        ready = self._add(self._decoder.finish())
        held, self._held = self._held, ""
        return ready if self.stopped else ready + held

    def _known(self, token: int) -> bool:
        return self._size is None or token < self._size

    def _add(self, piece: str) -> str:
        text = self._held + piece
        found = [at for at in map(text.find, self._stop_strings) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
