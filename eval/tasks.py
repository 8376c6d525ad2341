# SPDX-License-Identifier: Apache-2.0
"""Generation tasks: prompt, generate, extract, compare.

Questions come from JSONL files (GSM8K and its like) or are made up (`sqzjax.problems`). Every
sample is written out as soon as its batch is done, and an interrupted run continues after the last
one: a sample is reused only if the model, the prompt and every setting are the same.
"""

import hashlib
import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from eval.config import FewShot, Generation, Problems
from eval.extract import extract, wilson
from eval.usage import Usage, total
from sqzjax import problems
from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.errors import ConfigError, DataError
from sqzjax.io.tokenizer import Tokenizer


class TextModel(Protocol):
    """What a generation task asks of a model; `eval.models.LoadedModel` is one."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def fingerprint(self) -> str:
        """Text that changes whenever the weights or their execution do."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        row_ids: Sequence[int],
        truncate: Literal["never", "left"] = "never",
        usage: Usage | None = None,
    ) -> list[str]:
        """Return the continuations as text, without stop strings and special tokens."""
        ...


class Question(NamedTuple):
    """A prompt with the tokens that are fed, and the answer in the form that `read` returns."""

    prompt: str
    ids: list[int]
    gold: str


def read_jsonl(path: Path, limit: int = 0) -> list[dict[str, Any]]:
    """Read objects, one a line, skipping blank lines; DataError names file and line."""
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit and len(rows) == limit:
                    break
                if line.strip():
                    rows.append(_row(line, path, number))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    if not rows:
        raise DataError(f"{path} holds no line of JSON")
    return rows


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: must be a JSON object, not {line.strip():.40}")
    return {**row, _LINE: number}


_LINE = "\0line"


class _Template(string.Formatter):
    """`str.format` over plain field names: attribute and index access would reach into objects."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        if not re.fullmatch(r"\w+", field_name):
            raise ConfigError(f"template field {{{field_name}}} must be a plain name of a field")
        return kwargs[field_name], field_name


def fill(template: str, row: dict[str, Any], path: Path | str) -> str:
    """Fill a template from a line's fields; DataError names file, line and missing field."""
    try:
        return _Template().vformat(template, (), row)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"template {template!r:.80} is malformed: {error}") from error
    except KeyError as error:
        have = sorted(key for key in row if key != _LINE)
        raise DataError(
            f"{path}, line {row.get(_LINE, '?')}: no field {error} for the template; it has {have}"
        ) from error


def build_prompts(task: Generation, rows: Sequence[dict[str, Any]], seed: int) -> list[str]:
    """Return the prompt of each question, solved examples first."""
    shots = read_jsonl(Path(task.few_shot.data)) if task.few_shot else []
    prompts = []
    for index, row in enumerate(rows):
        parts = []
        if task.few_shot:
            chosen = _examples(task.few_shot, shots, row, seed + index)
            parts = [fill(task.example, shot, task.few_shot.data) for shot in chosen]
        separator = task.few_shot.separator if task.few_shot else ""
        prompts.append(separator.join([*parts, fill(task.prompt, row, task.data)]))
    return prompts


def _examples(
    few_shot: FewShot, shots: list[dict[str, Any]], row: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    """Choose examples, never the question itself."""
    question = {key: value for key, value in row.items() if key != _LINE}
    others = [s for s in shots if {k: v for k, v in s.items() if k != _LINE} != question]
    if len(others) < few_shot.count:
        raise DataError(
            f"{few_shot.data} has {len(others)} usable examples, fewer than "
            f"few_shot.count={few_shot.count}"
        )
    if few_shot.order == "random":
        return random.Random(seed).sample(others, few_shot.count)
    return others[: few_shot.count]


def run(
    task: Generation | Problems,
    model: TextModel,
    *,
    samples_file: Path,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Answer every question and return accuracy with its 95 % interval, cost and a few samples.

    `seed` draws the solved examples of a JSONL task.
    """
    if isinstance(task, Problems):
        questions = _made_up(task, model.tokenizer)
        truncate, read = "never", task.problems.extract
    else:
        questions = _from_file(task, model.tokenizer, seed)
        truncate, read = task.truncate, lambda text: extract(text, task.extract)
    keys = [_key(task, model, question.ids, index) for index, question in enumerate(questions)]
    done = _finished(samples_file, keys)
    todo = [index for index in range(len(questions)) if index not in done]
    todo.sort(key=lambda index: -len(questions[index].ids))

    def ask(batch: list[int]) -> Iterator[dict[str, Any]]:
        asked, usage = [questions[i].ids for i in batch], Usage()
        texts = model.generate(asked, task.sampling, row_ids=batch, truncate=truncate, usage=usage)
        costs = usage.rows or [None] * len(batch)
        for index, text, cost in zip(batch, texts, costs, strict=True):
            sample = _judge(index, questions[index], text, read(text))
            yield sample | {"key": keys[index], "cost": cost}

    with samples_file.open("w", encoding="utf-8") as file:
        for index in sorted(done):
            _write(file, done[index])
        if isinstance(task, Problems) and task.warm_up and todo:
            list(ask(todo[:batch_size]))
        for batch in _chunks(todo, batch_size):
            for sample in ask(batch):
                done[sample["index"]] = sample
                _write(file, sample)
            if progress is not None:
                progress(len(batch))
    return _summary([done[index] for index in range(len(questions))])


def _from_file(task: Generation, tokenizer: Tokenizer, seed: int) -> list[Question]:
    rows = read_jsonl(Path(task.data), task.limit)
    golds = [_gold(task, row) for row in rows]
    prompts = build_prompts(task, rows, seed)
    return [
        Question(prompt, encode(tokenizer, prompt, task.chat), gold)
        for prompt, gold in zip(prompts, golds, strict=True)
    ]


def _made_up(task: Problems, tokenizer: Tokenizer) -> list[Question]:
    stream = problems.stream(task.problems, split="eval", seed=task.seed)
    return [
        Question(problem.prompt, encode(tokenizer, problem.prompt), problem.answer)
        for problem in islice(stream, task.count)
    ]


def encode(tokenizer: Tokenizer, prompt: str, chat: bool = False) -> list[int]:
    """Encode a prompt the way the model expects texts to begin."""
    if not prompt:
        raise DataError("the prompt is empty; give the template some text")
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        return tokenizer.encode(text, parse_special=True)
    return tokenizer.encode(prompt, add_bos=None)


def _gold(task: Generation, row: dict[str, Any]) -> str:
    where = f"{task.data}, line {row[_LINE]}"
    if task.answer not in row:
        have = sorted(key for key in row if key != _LINE)
        raise DataError(f"{where}: no answer field {task.answer!r}; it has {have}")
    answer = extract(str(row[task.answer]), task.gold or task.extract)
    if answer is None:
        raise DataError(f"{where}: no gold answer found in {row[task.answer]!r:.80}")
    return answer


def _key(task: Generation | Problems, model: TextModel, ids: list[int], index: int) -> str:
    how = task.problems if isinstance(task, Problems) else task.extract
    settings = [model.fingerprint, ids, index, asdict(task.sampling), asdict(how)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _finished(samples_file: Path, keys: list[str]) -> dict[int, dict[str, Any]]:
    """Return samples of an earlier run that are still valid; a torn last line is ignored."""
    if not samples_file.exists():
        return {}
    done = {}
    for line in samples_file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            sample = json.loads(line)
            if keys[sample["index"]] == sample["key"]:
                done[sample["index"]] = sample
        except (ValueError, KeyError, IndexError, TypeError):
            continue
    return done


def _judge(index: int, question: Question, text: str, answer: str | None) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": question.prompt,
        "output": text,
        "extracted": answer,
        "gold": question.gold,
        "correct": answer == question.gold,
    }


def _write(file: Any, sample: dict[str, Any]) -> None:
    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    file.flush()


def _summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(sample["correct"] for sample in samples)
    low, high = wilson(right, len(samples))
    missing = sum(sample["extracted"] is None for sample in samples)
    shown = [
        {k: s[k] for k in ("prompt", "output", "extracted", "gold", "correct")} for s in samples
    ]
    return {
        "accuracy": right / len(samples),
        "interval_95": [low, high],
        "correct": right,
        "questions": len(samples),
        "without_answer": missing,
        "usage": total([sample.get("cost") for sample in samples]),
        "examples": shown[:3],
    }


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
