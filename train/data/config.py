# SPDX-License-Identifier: Apache-2.0
"""What a run trains on: documents (sources, tokenizer, packing), trajectories, or fields."""

from dataclasses import dataclass
from typing import Literal

from sqzjax.problems import ProblemConfig
from train.data.fields_config import FieldData


def _check_weight(source: "Source") -> None:
    if not 0 < source.weight < float("inf"):
        raise ValueError(
            f"weight={source.weight} of the {source.kind} source must be a number > 0; remove the "
            "source to leave it out"
        )


def _check_paths(kind: str, paths: tuple[str, ...]) -> None:
    # A bare string is a sequence too and would be read as one path per letter.
    if isinstance(paths, str) or not paths:
        raise ValueError(f"paths={paths!r} of the {kind} source must be a list of files or globs")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """English that ships with Python itself (about 2.7 MB); needs no file and no network."""

    kind: Literal["corpus"] = "corpus"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)


@dataclass(frozen=True, kw_only=True)
class Text:
    """Plain-text files or globs (`.gz` too).

    `separator` splits a file into documents (`"<|endoftext|>"`, or `"\\n\\n"` for blank lines);
    empty means that a file is one document.
    """

    kind: Literal["text"] = "text"
    paths: tuple[str, ...]
    separator: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)
        _check_paths(self.kind, self.paths)


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """One JSON object per line (`.gz` too): a text, or a prompt with its response.

    Either `text_key`, or both `prompt_key` and `response_key`; a prompt is followed by
    `prompt_end`, and neither of these two is a training target. `prompt_special` reads the special
    tokens that prompts spell out, as those in a chat template do; without it they are plain text.
    `response_end` follows each response and is a target, its special tokens read as such: the end
    of a turn (`"<|eot_id|>"`) where that is not the end-of-text token, which comes anyway.
    """

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]
    text_key: str | None = None
    prompt_key: str | None = None
    response_key: str | None = None
    prompt_end: str = "\n"
    prompt_special: bool = False
    response_end: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)
        _check_paths(self.kind, self.paths)
        keys = (self.text_key, self.prompt_key, self.response_key)
        given = tuple(key is not None for key in keys)
        if given not in ((True, False, False), (False, True, True)):
            raise ValueError(
                "jsonl: name the fields by text_key alone, or by prompt_key and response_key "
                f"together; got text_key={keys[0]!r}, prompt_key={keys[1]!r}, "
                f"response_key={keys[2]!r}"
            )
        if self.prompt_special and self.prompt_key is None:
            raise ValueError("prompt_special=true is of prompts; give prompt_key and response_key")
        if self.response_end and self.response_key is None:
            raise ValueError(
                f"response_end={self.response_end!r} is of responses; give prompt_key and "
                "response_key"
            )


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """A text column of parquet files, read batch by batch (needs pyarrow)."""

    kind: Literal["parquet"] = "parquet"
    paths: tuple[str, ...]
    text_key: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)
        _check_paths(self.kind, self.paths)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids made elsewhere: one-dimensional `.npy`, or raw `.bin` of `dtype`.

    A document ends at each `eos_id` (default: the tokenizer's); ids must fit the tokenizer.
    """

    kind: Literal["tokens"] = "tokens"
    paths: tuple[str, ...]
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    eos_id: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)
        _check_paths(self.kind, self.paths)


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Made-up problems with responses, `count` in all, taken from `problems` in turn.

    Prompts that evaluation tasks of `kind: problems` ask never occur, whatever their seeds.
    """

    kind: Literal["problems"] = "problems"
    problems: tuple[ProblemConfig, ...]
    count: int = 20_000
    seed: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check_weight(self)
        if not self.problems or self.count < 1:
            raise ValueError(
                f"count={self.count} of the problems source must be >= 1, and problems name at "
                "least one kind, such as {kind: addition}"
            )


Source = Corpus | Text | Jsonl | Parquet | Tokens | Problems


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The byte tokenizer: 260 ids, no file."""

    kind: Literal["bytes"] = "bytes"


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A Hugging Face tokenizer folder or `tokenizer.json`."""

    kind: Literal["files"] = "files"
    path: str


@dataclass(frozen=True, kw_only=True)
class TrainedBPE:
    """A byte-level BPE trained on the training documents (not the held-out ones), then cached.

    Only the first `max_characters` are used: merges of frequent pairs settle early.
    """

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = 4096
    min_frequency: int = 2
    max_characters: int = 50_000_000

    def __post_init__(self) -> None:
        if self.vocab_size < 260:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be >= 260: 256 bytes and 4 special tokens"
            )
        if self.min_frequency < 1 or self.max_characters < 1:
            raise ValueError(
                f"min_frequency={self.min_frequency} and max_characters={self.max_characters} must "
                "be >= 1"
            )


TokenizerConfig = Bytes | TokenizerFiles | TrainedBPE


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents from `sources` in proportion to their weights, packed into rows.

    `packing="packed"` joins documents and cuts the stream into full rows; `"padded"` gives each
    document a row, cut or filled. `document_mask=False` lets packed documents see each other.
    `eval_fraction` of the documents is held out, chosen by content (`eval_split="hash"`, stable
    when documents are added) or from the end of each source (`"tail"`, right for one long text).
    `on_bad_record="skip"` counts and reports what cannot be read instead of stopping.
    `add_bos=None` follows the tokenizer; `add_eos` ends each document with the tokenizer's eos.
    `pad_with_eos` fills padded rows with eos as ordinary targets, so that a diffusion model learns
    how long a response is (fine-tuning of LLaDA, arXiv 2502.09992).
    """

    kind: Literal["documents"] = "documents"
    sources: tuple[Source, ...] = (Corpus(),)
    tokenizer: TokenizerConfig = Bytes()
    packing: Literal["packed", "padded"] = "packed"
    document_mask: bool = True
    shuffle: bool = True
    eval_fraction: float = 0.02
    eval_split: Literal["hash", "tail"] = "hash"
    on_bad_record: Literal["skip", "error"] = "error"
    add_bos: bool | None = None
    add_eos: bool = True
    pad_with_eos: bool = False

    def __post_init__(self) -> None:
        if self.pad_with_eos and self.packing != "padded":
            raise ValueError(
                f"pad_with_eos=true needs packing: padded, not {self.packing!r}; packed rows have "
                "nothing to fill"
            )
        if not self.sources:
            raise ValueError("data.sources is empty; name at least one, such as {kind: corpus}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction={self.eval_fraction} must lie in [0, 1); 0 holds nothing out"
            )


@dataclass(frozen=True, kw_only=True)
class TrajectoryData:
    """Teacher trajectories that a run of `kind: collect` has recorded: `path` is its folder.

    `eval_fraction` of the prompts, chosen by their content, is held out.
    """

    kind: Literal["trajectories"] = "trajectories"
    path: str
    shuffle: bool = True
    eval_fraction: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction={self.eval_fraction} must lie in [0, 1); 0 holds nothing out"
            )


AnyData = DataConfig | TrajectoryData | FieldData
"""What a run can train on."""
