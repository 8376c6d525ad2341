# SPDX-License-Identifier: Apache-2.0
"""The tokenizer protocol and what every tokenizer shares: checks of text and ids, streaming."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

ROLES = ("bos", "eos", "pad", "mask")
NO_TEMPLATE = (
    "this tokenizer has no chat template; put one into the chat_template of tokenizer_config.json, "
    "or give the prompt as text"
)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer; ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may be larger."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id that begins a document, or None."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, or None."""
        ...

    @property
    def pad_id(self) -> int | None:
        """Id that fills unused positions, or None."""
        ...

    @property
    def mask_id(self) -> int | None:
        """Id that hides a token from a diffusion model, or None."""
        ...

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own configuration begins every text with `bos_id`."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of everything that determines `encode`."""
        ...

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = False,
        add_eos: bool = False,
        parse_special: bool = False,
    ) -> list[int]:
        """Turn text into ids; `add_bos=None` does what the tokenizer's configuration says.

        `parse_special=True` reads special-token text as special tokens: use it for the output of a
        chat template, never for documents. What a user writes into a chat is then parsed too.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts at once, without special tokens; in parallel where possible."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are not UTF-8 become U+FFFD, unknown ids an error."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write files that `load(folder)` and Hugging Face transformers read back."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation to text; encode it with `parse_special=True`."""
        ...


class IncrementalDecoder:
    """Turn a stream of ids into text, holding back characters whose bytes are incomplete.

    The concatenation of all returned pieces equals `decode` of all ids for valid UTF-8. `prompt`
    ids precede the stream: sentencepiece-style tokenizers drop the leading space of a text, which a
    continuation must keep.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, prompt: Sequence[int] = ()
    ):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # The piece returned last stays as context: it is decoded again together with the new ids,
        # and only what is longer is returned. It is never cut, since a cut could split a character.
        self._context = list(prompt)
        self._before = tokenizer.decode(self._context, skip_special)
        self._pending: list[int] = []

    def push(self, *ids: int) -> str:
        """Add ids; return the text that is now certain, possibly empty."""
        self._pending.extend(ids)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        self._before = self._tokenizer.decode(self._context, self._skip_special)
        return text

    def finish(self) -> str:
        """Return what was held back, incomplete bytes as U+FFFD; nothing may be pushed after."""
        text = self._new_text()
        self._pending = []
        return text

    def _new_text(self) -> str:
        if not self._pending:
            return ""
        text = self._tokenizer.decode(self._context + self._pending, self._skip_special)
        return text[len(self._before) :]


def to_utf8(text: str) -> bytes:
    """Encode text, refusing what is not text (wrong type, lone surrogates) with a clear error."""
    if not isinstance(text, str):
        raise ValueError(f"a tokenizer encodes text, not {type(text).__name__}: {text!r:.80}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is not valid Unicode; drop or replace it"
        ) from error


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """Return ids as int64, or raise naming the first one outside [0, vocab_size)."""
    array = np.asarray(ids)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"ids must be one flat sequence of integers, not {ids!r:.80}")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        raise ValueError(
            f"id {array[bad[0]]} at position {bad[0]} must lie in [0, {vocab_size}), the vocabulary"
        )
    return array.astype(np.int64)


def surround(
    tokenizer: Tokenizer, ids: list[int], add_bos: bool | None, add_eos: bool
) -> list[int]:
    """Return ids with the tokens of begin and end asked for; ValueError where there is none.

    `add_bos=None` does as the tokenizer's own settings say.
    """
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    no_bos, no_eos = add_bos and bos is None, add_eos and eos is None
    if no_bos or no_eos:
        missing = "bos" if no_bos else "eos"
        raise ValueError(
            f"add_{missing}=True, but this tokenizer has no {missing} token; leave it False"
        )
    with_bos = tokenizer.adds_bos and bos is not None if add_bos is None else add_bos
    return ([bos] if with_bos else []) + ids + ([eos] if add_eos else [])  # pyright: ignore


def write_files(folder: Path, definition: str, settings: Mapping[str, Any]) -> None:
    """Write a tokenizer into a folder, as the two files of Hugging Face's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    text = json.dumps(settings, ensure_ascii=False, indent=1, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
