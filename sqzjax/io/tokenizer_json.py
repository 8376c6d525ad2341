# SPDX-License-Identifier: Apache-2.0
"""Hugging Face `tokenizer.json` files, through the `tokenizers` package (extra `hf`)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sqzjax.io.chat import ChatTemplate
from sqzjax.io.tokenizer_base import (
    NO_TEMPLATE,
    ROLES,
    check_ids,
    surround,
    to_utf8,
    write_files,
)


class JsonTokenizer:
    """A Hugging Face `tokenizer.json` with its settings; build it with `load`.

    `settings` is the content of `tokenizer_config.json`; `special_ids` (of a model's `config.json`)
    serve the roles that it does not mention. A role that it sets to null has no token.
    """

    def __init__(
        self,
        definition: str,
        settings: Mapping[str, Any] | None = None,
        *,
        special_ids: Mapping[str, int] | None = None,
        chat_template: str | None = None,
    ):
        self._definition = definition
        self._settings = dict(settings or {})
        self._plain = _parse_definition(definition)
        self._plain.encode_special_tokens = True
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        ids = {role: self._special_id(role, vocabulary, special_ids or {}) for role in ROLES}
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (ids[role] for role in ROLES)
        # Without the setting, the post-processor of tokenizer.json tells (Llama 3). transformers
        # reads the setting for some classes only; here whoever wrote it is believed.
        with_special = self._plain.encode("", add_special_tokens=True).ids
        adds_bos = self.bos_id is not None and with_special[:1] == [self.bos_id]
        own = self._settings.get("add_bos_token")
        self.adds_bos = adds_bos if own is None else bool(own)
        self._chat_source = chat_template
        canonical = json.dumps(json.loads(definition), sort_keys=True)
        described = json.dumps([canonical, ids, self.adds_bos], sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def _special_id(
        self, role: str, vocabulary: Mapping[str, int], fallback: Mapping[str, int]
    ) -> int | None:
        content = _content(self._settings.get(f"{role}_token"))
        if content is None:
            number = None if f"{role}_token" in self._settings else fallback.get(role)
            return number if number is not None and 0 <= number < self.vocab_size else None
        if content not in vocabulary:
            raise ValueError(
                f"{role}_token={content!r} of tokenizer_config.json is not in the vocabulary of "
                "tokenizer.json; the two files belong to different tokenizers"
            )
        return vocabulary[content]

    @cached_property
    def _special(self) -> Any:
        # A second instance, since the switch for special tokens is state of the Rust object and
        # flipping it per call would race between threads.
        return _parse_definition(self._definition)

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = False,
        add_eos: bool = False,
        parse_special: bool = False,
    ) -> list[int]:
        """Turn text into ids; see `Tokenizer.encode`."""
        to_utf8(text)
        backend = self._special if parse_special else self._plain
        ids = backend.encode(text, add_special_tokens=False).ids
        return surround(self, ids, add_bos, add_eos)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores, without special tokens."""
        for text in texts:
            to_utf8(text)
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = True) -> str:
        """Turn ids into text; see `Tokenizer.decode`."""
        checked = check_ids(ids, self.vocab_size).tolist()
        return self._plain.decode(checked, skip_special_tokens=skip_special)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as loaded."""
        settings = dict(self._settings)
        for role in ROLES:
            number = getattr(self, f"{role}_id")
            if number is not None:
                settings[f"{role}_token"] = self._plain.id_to_token(number)
        if self._chat_source is not None:
            settings["chat_template"] = self._chat_source
        write_files(Path(folder), self._definition, settings)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation to text; encode it with `parse_special=True`."""
        return self._chat.render(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self._chat_source is None:
            raise ValueError(NO_TEMPLATE)
        named = {name: value for name, value in self._settings.items() if name.endswith("_token")}
        texts = {name: _content(value) for name, value in named.items()}
        texts = {name: text for name, text in texts.items() if isinstance(text, str)}
        return ChatTemplate(self._chat_source, texts)


def from_file(file: Path, settings: Mapping[str, Any]) -> JsonTokenizer:
    """Read a `tokenizer.json` with the special tokens and chat template of its folder."""
    folder = file.parent
    special = read_json(folder / "special_tokens_map.json")
    # As in transformers: the older file counts unless the newer one lists the added tokens.
    newer = "added_tokens_decoder" in settings
    merged = {**special, **settings} if newer else {**settings, **special}
    return JsonTokenizer(
        _read_text(file),
        merged,
        special_ids=_config_ids(read_json(folder / "config.json")),
        chat_template=_chat_source(folder, settings),
    )


def _content(token: Any) -> Any:
    """Return the text of a special token, which may be an object with settings of its own."""
    return token.get("content") if isinstance(token, Mapping) else token


def _parse_definition(definition: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "reading tokenizer.json needs the package tokenizers; install the extra 'hf', or use "
            "the tokenizer 'bytes'"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"damaged tokenizer.json: {error}") from error
    # A file may carry the cut and the filling of its last use; both would damage documents here.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _config_ids(config: Mapping[str, Any]) -> dict[str, int]:
    ids = {}
    for role in ROLES:
        value = config.get(f"{role}_token_id")
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int) and not isinstance(first, bool):
            ids[role] = first
    return ids


def _chat_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    return source
