# SPDX-License-Identifier: Apache-2.0
"""What an evaluation runs: models side by side, tasks, and how they are batched.

Plain dataclasses without jax, so that a configuration is checked before anything is loaded.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.speed_config import SpeedConfig
from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.problems import ProblemConfig

HELD_OUT = "heldout"
"""As `data` of a perplexity task: the documents that the model's own training run held out."""


def _need(name: str, value: object, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} {rule}")


def label(entry: Any) -> str:
    """Return the name of a model or task; tasks without one are named by their kind."""
    return getattr(entry, "name", "") or entry.kind


def _unique(values: tuple[float, ...]) -> bool:
    return len(set(values)) == len(values)


def _greedy() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=256, temperature=0.0)


def _lively() -> SamplingConfig:
    return SamplingConfig(max_new_tokens=128, temperature=0.8, top_p=0.95)


def _default_name(task: Any, name: str) -> None:
    # The dataclass is frozen; naming it here keeps every later reader free of special cases.
    if not task.name:
        object.__setattr__(task, "name", name)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How log-likelihoods of masked diffusion models are bounded (`eval.diffusion_scoring`)."""

    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        _need("samples", self.samples, self.samples >= 1, "must be >= 1; LLaDA uses 128")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One column of the report: weights and how they run.

    `path` is a Hugging Face folder or the working folder of a training run. Of a run, `weights`
    picks the newest good checkpoint or the exported folder; `auto` is the checkpoint when there is
    one. `step` names one checkpoint. `tokenizer` overrides the one beside the weights (a folder or
    "bytes"). `cache` are the settings of a cache policy, with its `kind`; null scores through the
    plain forward pass and generates with the dense cache. `decoder` are the settings of a decoding
    method, with its `kind` ("diffusion"); null decodes autoregressively. `reference` is where the
    model lies that opens the blocks of RCD's `context: {kind: residual, init_from: reference}`.
    `likelihood` matters to masked diffusion models only, whose bounds use no cache.
    """

    path: str
    name: str = ""
    weights: Literal["auto", "checkpoint", "export"] = "auto"
    step: int | None = None
    tokenizer: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    reference: str = ""
    likelihood: Likelihood = Likelihood()

    def __post_init__(self) -> None:
        _need("models.path", self.path, bool(self.path), "name a folder")
        if not self.name:
            object.__setattr__(self, "name", Path(self.path).resolve().name)
        if self.cache is not None and not isinstance(self.cache.get("kind"), str):
            raise ValueError(f"cache={self.cache} of model {self.name!r} needs a kind, e.g. dense")
        if self.decoder is not None and self.decoder.get("kind") != "diffusion":
            raise ValueError(f"decoder={self.decoder} of model {self.name!r} needs kind: diffusion")


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity of a text file, or of `data: heldout`, every token scored once.

    `separator` splits the file into documents scored on their own (stripped, empty ones dropped);
    empty makes the file one document. `context` is the most tokens fed at once (0: the model's
    maximum), `stride` how many new tokens each further window scores (0: all of it, windows do not
    overlap; smaller gives every token more context and costs context/stride times more).
    `long_documents="truncate"` keeps only the first `context` tokens, BOS included. `bos="auto"`
    begins documents with BOS where the tokenizer's own configuration does; without BOS the first
    token of a document is context only.
    """

    kind: Literal["perplexity"] = "perplexity"
    name: str = ""
    data: str
    separator: str = ""
    context: int = 0
    stride: int = 0
    long_documents: Literal["window", "truncate"] = "window"
    bos: Literal["auto", "always", "never"] = "auto"
    limit: int = 0

    def __post_init__(self) -> None:
        _default_name(self, f"perplexity_{Path(self.data).stem}")
        _need("context", self.context, self.context >= 0, "must be >= 0; 0 is the model's maximum")
        _need("limit", self.limit, self.limit >= 0, "must be >= 0; 0 scores every document")
        fits = self.stride >= 0 and (not self.context or self.stride <= self.context)
        _need("stride", self.stride, fits, f"must lie in [0, context={self.context}]; 0 is context")


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How an answer is read from text.

    `numeric`: the number after the last `after`, else the last number (commas, currency signs and
    trailing zeros do not matter). `regex`: the first group of the last match, or the whole match.
    `exact`: the whole text. Regex and exact answers are compared without surrounding space and,
    unless `case_sensitive`, in lower case.
    """

    kind: Literal["numeric", "regex", "exact"] = "exact"
    after: str = "####"
    pattern: str = ""
    case_sensitive: bool = False

    def __post_init__(self) -> None:
        given = bool(self.pattern) == (self.kind == "regex")
        _need("pattern", self.pattern, given, "belongs to kind='regex' and must not be empty there")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"pattern={self.pattern!r} is no regular expression: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """`count` solved examples before each question: the first of `data`, or drawn with the seed."""

    data: str
    count: int = 4
    order: Literal["first", "random"] = "first"
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        _need("few_shot.count", self.count, self.count >= 1, "must be >= 1; leave few_shot out")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Questions from a JSONL file, answered by generating text and compared exactly.

    `prompt` and `example` (a solved question) are `str.format` templates over the fields of a
    line. `answer` is the field with the gold answer, `gold` how to read it, `extract` how to read
    the model's. `chat` wraps the prompt as one user message in the tokenizer's chat template.
    `truncate="left"` drops the beginning of prompts that are too long instead of refusing them.
    Every sample goes to `samples_<task>_<model>.jsonl`; an interrupted task continues there.
    """

    kind: Literal["generation"] = "generation"
    name: str = ""
    data: str
    prompt: str = "Question: {question}\nAnswer:"
    example: str = "Question: {question}\nAnswer: {answer}"
    answer: str = "answer"
    extract: Extraction = Extraction()
    gold: Extraction | None = None
    few_shot: FewShot | None = None
    sampling: SamplingConfig = field(default_factory=_greedy)
    truncate: Literal["never", "left"] = "never"
    chat: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        _default_name(self, Path(self.data).stem)
        _need("limit", self.limit, self.limit >= 0, "must be >= 0; 0 asks every question")


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Made-up problems of `sqzjax.problems`, held-out prompts alone, compared exactly.

    With `warm_up` the first batch runs once more, unmeasured: speeds then leave compilation out.
    """

    kind: Literal["problems"] = "problems"
    name: str = ""
    problems: ProblemConfig
    count: int = 200
    seed: int = 1
    sampling: SamplingConfig = field(default_factory=_greedy)
    warm_up: bool = True

    def __post_init__(self) -> None:
        _default_name(self, self.problems.kind)
        _need("count", self.count, self.count >= 1, "must be >= 1")


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Find a number hidden in filler text: a grid of context lengths (tokens) and depths (0-1).

    `likelihood` ranks the true number among `alternatives` others by log-likelihood, which shows a
    signal long before a model can write it out; `generate` asks for it and compares exactly.
    `filler` is a text file; empty uses a few built-in sentences.
    """

    kind: Literal["needle"] = "needle"
    name: str = "needle"
    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    mode: Literal["likelihood", "generate", "both"] = "both"
    digits: int = 5
    alternatives: int = 9
    filler: str = ""
    needle: str = "The secret number of {place} is {number}. Remember it."
    question: str = "\nThe secret number of {place} is"

    def __post_init__(self) -> None:
        good = bool(self.lengths) and min(self.lengths) >= 1 and _unique(self.lengths)
        _need("lengths", self.lengths, good, "must be different numbers >= 1, at least one")
        good = bool(self.depths) and all(0 <= d <= 1 for d in self.depths) and _unique(self.depths)
        _need("depths", self.depths, good, "must be different fractions in [0, 1], at least one")
        _need("samples", self.samples, self.samples >= 1, "must be >= 1")
        _need("digits", self.digits, 2 <= self.digits <= 12, "must lie in [2, 12]")
        possible = 9 * 10 ** (self.digits - 1) - 1
        good = 1 <= self.alternatives <= min(possible, 1000)
        _need("alternatives", self.alternatives, good, "must lie in [1, 1000] and exist as numbers")
        _need("needle", self.needle, "{number}" in self.needle, "must contain {number}")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Free continuations of prompts, shown in the report."""

    kind: Literal["samples"] = "samples"
    name: str = "samples"
    prompts: tuple[str, ...]
    sampling: SamplingConfig = field(default_factory=_lively)

    def __post_init__(self) -> None:
        _need("prompts", self.prompts, bool(self.prompts), "needs at least one prompt")


@dataclass(frozen=True, kw_only=True)
class LmEval:
    """Tasks of the lm-eval package (extra `eval`); `include_path` adds task files of your own."""

    kind: Literal["lm_eval"] = "lm_eval"
    name: str = "lm_eval"
    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int = 0
    include_path: str = ""

    def __post_init__(self) -> None:
        _need("tasks", self.tasks, bool(self.tasks), "needs at least one task name")


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """The losses that a training run wrote to its `metrics.jsonl`."""

    kind: Literal["training_curve"] = "training_curve"
    name: str = "training"


TaskConfig = (
    Perplexity | Generation | Problems | Needle | Samples | LmEval | TrainingCurve | SpeedConfig
)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Every task runs on every model; `batch_size` sequences at a time.

    `max_length` is the most tokens fed to a model at once (0: what it was built for), and
    `prefill_chunk` how many enter a model's cache together. A `speed` task has models of its own
    and runs once.
    """

    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskConfig, ...]
    title: str = "Evaluation"
    workdir: str = ""
    seed: int = 0
    batch_size: int = 8
    max_length: int = 0
    prefill_chunk: int = 128

    def __post_init__(self) -> None:
        for key, things in (("models", self.models), ("tasks", self.tasks)):
            names = [label(thing) for thing in things]
            twice = sorted({name for name in names if names.count(name) > 1})
            _need(key, names, bool(names), "needs at least one entry")
            _need(f"{key}.name", twice, not twice, "is used twice; give each entry its own name")
        _need("batch_size", self.batch_size, self.batch_size >= 1, "must be >= 1")
        _need("prefill_chunk", self.prefill_chunk, self.prefill_chunk >= 1, "must be >= 1")
        _need("max_length", self.max_length, self.max_length >= 0, "must be >= 0")
