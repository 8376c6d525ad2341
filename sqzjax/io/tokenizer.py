# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back.

`load("bytes")` needs no file and no package: 256 bytes and four special tokens, for tests and for
small models. `load(folder)` reads a Hugging Face `tokenizer.json` through the `tokenizers` package
(extra `hf`), with the special tokens of the files beside it. Neither interprets special-token text
inside a document unless `parse_special=True` asks for it, so a web page that contains `</s>` cannot
end a training document.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqzjax.io.tokenizer_base import (
    NO_TEMPLATE,
    ROLES,
    IncrementalDecoder,
    Tokenizer,
    check_ids,
    surround,
    to_utf8,
    write_files,
)
from sqzjax.io.tokenizer_json import JsonTokenizer, from_file, read_json

__all__ = ["ByteTokenizer", "IncrementalDecoder", "JsonTokenizer", "Tokenizer", "load"]

_MARKER = "sqzjax_tokenizer"


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255, then bos 256, eos 257, pad 258, mask 259: `vocab_size` is 260."""

    vocab_size = 260
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    mask_id: int | None = 259
    adds_bos = False
    fingerprint = hashlib.sha256(
        b"sqzjax byte tokenizer 1: 256 bytes, bos, eos, pad, mask"
    ).hexdigest()

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = False,
        add_eos: bool = False,
        parse_special: bool = False,
    ) -> list[int]:
        """Turn text into its UTF-8 bytes; special tokens have no text form to parse."""
        del parse_special
        return surround(self, list(to_utf8(text)), add_bos, add_eos)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts, without special tokens."""
        return [list(to_utf8(text)) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Turn ids into text; special tokens show as `<|bos|>` and so on when not skipped."""
        checked = check_ids(ids, self.vocab_size)
        if skip_special:
            return bytes(checked[checked < 256].tolist()).decode("utf-8", errors="replace")
        names = [f"<|{role}|>".encode() for role in ROLES]
        parts = (names[i - 256] if i >= 256 else bytes((i,)) for i in checked.tolist())
        return b"".join(parts).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write a byte-level BPE without merges, which transformers reads as the same ids."""
        definition = _byte_level_json()
        special = {f"{role}_token": f"<|{role}|>" for role in ROLES}
        settings = {_MARKER: "bytes", "tokenizer_class": "PreTrainedTokenizerFast", **special}
        write_files(Path(folder), json.dumps(definition, ensure_ascii=False, indent=1), settings)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Refuse: the byte tokenizer has no chat template."""
        del messages, add_generation_prompt
        raise ValueError(NO_TEMPLATE)


def load(source: str | Path) -> Tokenizer:
    """Load `"bytes"`, a folder with a `tokenizer.json`, or that file itself."""
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"no tokenizer at {str(source)!r}: it must be 'bytes', a folder with a tokenizer.json, "
            "or such a file"
        )
    settings = read_json(file.parent / "tokenizer_config.json")
    if settings.get(_MARKER) == "bytes":
        return ByteTokenizer()
    return from_file(file, settings)


def _byte_level_json() -> dict[str, Any]:
    # GPT-2's printable stand-ins: bytes that print stand for themselves, the rest follow U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": 256 + index, "content": f"<|{role}|>", **flags, "special": True}
        for index, role in enumerate(ROLES)
    ]
    vocabulary = {stand_in[byte]: byte for byte in range(256)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }
