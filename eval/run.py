# SPDX-License-Identifier: Apache-2.0
"""Run every task on every model and write `results.json` and `report.html`.

Results are saved after each task, and a task that fails is recorded and does not stop the others.
What is wrong with the configuration or its files is reported before anything is loaded.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.config import (
    HELD_OUT,
    EvalConfig,
    Generation,
    LmEval,
    ModelEntry,
    Needle,
    Perplexity,
    Problems,
    Samples,
    TaskConfig,
    TrainingCurve,
    label,
)
from eval.speed_config import SpeedConfig
from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable

OK, FAILED = 0, 1
_LOG = logging.getLogger(__name__)
_PACKAGES = ("sqzjax", "jax", "jaxlib", "flax", "numpy", "tokenizers")


class DoesNotApplyError(Exception):
    """The task does not apply to this model; the reason is shown in the report."""


class Ticker:
    """Logs how many requests of a task are done, at most every `interval` seconds."""

    def __init__(self, name: str, interval: float = 30.0):
        self._name, self._interval = name, interval
        self._done, self._last = 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            _LOG.info("%s: %d requests done", self._name, self._done)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a task needs besides its own settings and the model."""

    config: EvalConfig
    workdir: Path


def run(config: EvalConfig, *, workdir: Path, dry_run: bool = False) -> int:
    """Evaluate; return 0, or 1 if any task failed. ConfigError if the inputs are not usable."""
    missing = missing_inputs(config)
    if dry_run:
        _print_plan(config, missing)
        return OK
    if missing:
        raise ConfigError(missing)
    document = evaluate(config, workdir)
    from eval import report, summary

    atomic.write_text(workdir / "report.html", report.render(document))
    summary.show(document, workdir)
    return FAILED if failures(document) else OK


def failures(document: dict[str, Any]) -> list[str]:
    """Return one line per model that did not load and task that failed."""
    lines = [f"{m['name']}: {m['error']}" for m in document["models"] if "error" in m]
    for result in document["results"]:
        if result["status"] == "failed":
            lines.append(f"{result['task']} on {result['model']}: {result['error']}")
    return lines


def missing_inputs(config: EvalConfig) -> list[str]:
    """List files and folders that the configuration names and that do not exist."""
    problems = []
    for index, entry in enumerate(config.models):
        for name, path in (("path", entry.path), ("reference", entry.reference)):
            if path and not Path(path).exists():
                problems.append(f"models.{index}.{name}: no such folder {path!r}")
    for index, task in enumerate(config.tasks):
        problems += missing_files(task, f"tasks.{index}")
    return problems


def missing_files(task: TaskConfig, key: str) -> list[str]:
    """List files that a task names and that do not exist; `key` is where its settings stand."""
    return [
        f"{key}.{field}: no such file {path!r}"
        for field, path in files_of(task)
        if not Path(path).is_file()
    ]


def too_long(task: Any, key: str, model: str, positions: int) -> list[str]:
    """Say whether `context`, of a task or of a configuration, is more than a model can be fed."""
    context = getattr(task, "context", 0)
    if context <= positions:
        return []
    return [
        f"{key}={context} exceeds max_positions={positions} of model {model!r}; use "
        f"{positions} or less, or 0 for the model's maximum"
    ]


def _too_long(config: EvalConfig, located: Sequence[Any]) -> list[str]:
    return [
        line
        for index, task in enumerate(config.tasks)
        if isinstance(task, Perplexity)
        for entry, found in zip(config.models, located, strict=True)
        if found is not None
        for line in too_long(task, f"tasks.{index}.context", entry.name, found.config.max_positions)
    ]


def files_of(task: Any) -> list[tuple[str, str]]:
    """Return the files that a task reads: where its settings name them, and their paths."""
    match task:
        case Perplexity():
            return [] if task.data == HELD_OUT else [("data", task.data)]
        case Generation():
            shots = [("few_shot.data", task.few_shot.data)] if task.few_shot else []
            return [("data", task.data), *shots]
        case Needle():
            return [("filler", task.filler)] if task.filler else []
        case _:
            return []


def evaluate(config: EvalConfig, workdir: Path) -> dict[str, Any]:
    """Run everything and return the document that `results.json` holds."""
    from eval import models

    located = []
    for entry in config.models:
        models.cache_policy(entry)
        models.decoder_config(entry)
        try:
            located.append(models.locate(entry))
        except CheckpointError:
            located.append(None)  # costs this model alone, whose loading fails in the same way
    if problems := _too_long(config, located):
        raise ConfigError(problems)
    check_writable(workdir)
    document = {"title": config.title, **environment(), "config": configs.to_dict(config)}
    document |= {"models": [], "results": []}
    context = Context(config=config, workdir=workdir)
    for entry, found in zip(config.models, located, strict=True):
        tasks = [task for task in config.tasks if not isinstance(task, SpeedConfig)]
        _evaluate_model(entry, found, tasks, context, document)
    for task in config.tasks:
        if isinstance(task, SpeedConfig):
            _record(task, "", lambda task=task: _speed(task, context), document, workdir)
    return document


def _evaluate_model(
    entry: ModelEntry,
    found: Any,
    tasks: Sequence[TaskConfig],
    context: Context,
    document: dict[str, Any],
) -> None:
    from eval import models

    config = context.config
    try:
        model = models.load(
            entry,
            found,
            batch_size=config.batch_size,
            max_length=config.max_length,
            prefill_chunk=config.prefill_chunk,
        )
    except Exception as error:
        _LOG.exception("model %s could not be loaded", entry.name)
        document["models"].append({"name": entry.name, "source": entry.path, "error": _say(error)})
        save(document, context.workdir)
        return
    document["models"].append(model.describe())
    for task in tasks:
        work = lambda task=task: perform(task, model, context)  # noqa: E731
        _record(task, entry.name, work, document, context.workdir)


def _record(
    task: TaskConfig,
    model: str,
    work: Callable[[], dict[str, Any]],
    document: dict[str, Any],
    workdir: Path,
) -> None:
    """Run one task and append its result, whatever becomes of it."""
    _LOG.info("%s on %s", label(task), model or "its own models")
    result: dict[str, Any] = {"task": label(task), "kind": task.kind, "model": model}
    began = time.perf_counter()
    try:
        result |= {"status": "ok", "metrics": work()}
    except DoesNotApplyError as reason:
        result |= {"status": "skipped", "error": str(reason)}
    except Exception as error:
        # A refused request explains itself; anything else is a fault whose place matters.
        trace = None if isinstance(error, ValueError) else error
        _LOG.error("%s on %s failed: %s", label(task), model, _say(error), exc_info=trace)
        result |= {"status": "failed", "error": _say(error)}
    result |= {"seconds": time.perf_counter() - began, "settings": configs.to_dict(task)}
    document["results"].append(result)
    save(document, workdir)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def save(document: dict[str, Any], workdir: Path) -> None:
    """Replace `results.json` at once, so that a reader never sees half of it."""
    atomic.write_text(workdir / "results.json", json.dumps(document, indent=1, allow_nan=False))


def environment() -> dict[str, Any]:
    """Return date, versions and device of this run."""
    import jax

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "sqzjax" not in versions:
        import sqzjax

        versions["sqzjax"] = sqzjax.__version__
    device = jax.devices()[0]
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        },
    }


# Tasks ------------------------------------------------------------------------------------------


def perform(task: TaskConfig, model: Any, context: Context) -> dict[str, Any]:
    """Run one task on a loaded model and return its figures."""
    return _HANDLERS[type(task)](task, model, context)


def _perplexity(task: Perplexity, model: Any, context: Context) -> dict[str, Any]:
    from eval import curves, perplexity

    length = task.context or model.limit
    stride = task.stride or length
    held_out = task.data == HELD_OUT
    baselines = {}
    if held_out:
        workdir = model.found.workdir
        if workdir is None:
            raise DoesNotApplyError("the model is no training run: it has no held-out documents")
        cut = length if task.long_documents == "truncate" else None
        documents = perplexity.held_out_documents(
            workdir, model.tokenizer, limit=task.limit, truncate_to=cut
        )
        baselines = curves.baselines(workdir)
        bos = "as trained"
    else:
        documents = perplexity.read_documents(task, model.tokenizer, length)
        bos = "yes" if perplexity.begins_with_bos(task, model.tokenizer) else "no"
    scorer = model.scorer(max_length=length)
    # A masked diffusion model is fed the last token too.
    length, stride = scorer.limit, min(stride, scorer.limit)
    result = perplexity.measure(
        documents, scorer, context=length, stride=stride, progress=Ticker(task.name)
    )
    return {**result, "context": length, "stride": stride, "bos": bos, "baselines": baselines}


def _generation(task: Generation | Problems, model: Any, context: Context) -> dict[str, Any]:
    from eval import tasks

    name = re.sub(r"[^\w.-]+", "_", f"samples_{task.name}_{model.name}")
    return tasks.run(
        task,
        model,
        samples_file=context.workdir / f"{name}.jsonl",
        batch_size=context.config.batch_size,
        seed=context.config.seed,
        progress=Ticker(task.name),
    )


def _needle(task: Needle, model: Any, context: Context) -> dict[str, Any]:
    from eval import needle

    scorer = None
    if task.mode != "generate":
        scorer = model.scorer()
    config = context.config
    return needle.run(
        task,
        model,
        scorer,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=Ticker(task.name),
    )


def _samples(task: Samples, model: Any, context: Context) -> dict[str, Any]:
    from eval.tasks import encode

    prompts = [encode(model.tokenizer, prompt) for prompt in task.prompts]
    texts = model.generate(prompts, task.sampling, row_ids=range(len(prompts)))
    pairs = zip(task.prompts, texts, strict=True)
    return {"samples": [{"prompt": prompt, "output": text} for prompt, text in pairs]}


def _lm_eval(task: LmEval, model: Any, context: Context) -> dict[str, Any]:
    from eval import lm_harness

    return lm_harness.run(task, model, seed=context.config.seed)


def _training_curve(task: TrainingCurve, model: Any, context: Context) -> dict[str, Any]:
    from eval import curves

    workdir = model.found.workdir
    if workdir is None:
        raise DoesNotApplyError("the model is no training run: it has no metrics.jsonl")
    return curves.training_curve(workdir)


def _speed(task: SpeedConfig, context: Context) -> dict[str, Any]:
    from eval import speed

    return speed.run_speed(task, context.workdir / "speed")


_HANDLERS: dict[type, Callable[[Any, Any, Context], dict[str, Any]]] = {
    Perplexity: _perplexity,
    Generation: _generation,
    Problems: _generation,
    Needle: _needle,
    Samples: _samples,
    LmEval: _lm_eval,
    TrainingCurve: _training_curve,
}


def _print_plan(config: EvalConfig, missing: list[str]) -> None:
    """Print the resolved configuration and the size of each model that is there."""
    from rich.console import Console

    from eval import models

    console = Console(soft_wrap=True, highlight=False)
    console.print(configs.dump(config), end="", markup=False)
    located = []
    for entry in config.models:
        models.cache_policy(entry)
        models.decoder_config(entry)
        located.append(None)
        if all(Path(path).exists() for path in (entry.path, entry.reference or ".")):
            found = located[-1] = models.locate(entry)
            size = found.config.num_params
            console.print(f"# {entry.name}: {size:,} parameters, {found.source}", markup=False)
    for problem in missing:
        console.print(f"# not found yet: {problem}", markup=False)
    for problem in _too_long(config, located):
        console.print(f"# {problem}", markup=False)
