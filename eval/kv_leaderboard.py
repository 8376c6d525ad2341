# SPDX-License-Identifier: Apache-2.0
"""Compare caches on one model: `results.json`, a table, two Pareto plots and `report.html`.

Every row is saved as soon as it is measured. A cache that fails says so in its row and stops
nothing; running the same command again keeps the finished rows and tries the failed ones anew.
Rows are recognised by model, settings and the files that these name, not by the code: give another
folder after changing it.
"""

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import jax

from eval import kv_leaderboard_measure as measures
from eval import models, run
from eval.cache_rows import CacheRow
from eval.kv_leaderboard_config import KvLeaderboardConfig
from eval.models import LoadedModel
from eval.provenance import provenance
from sqzjax import config as configs
from sqzjax import kvcache
from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io.lock import check_writable

_LOG = logging.getLogger(__name__)
_NOT_MEASURED = ("caches", "title", "workdir", "baseline")
Row = dict[str, Any]


def run_kv_leaderboard(config: KvLeaderboardConfig, workdir: Path) -> dict[str, Any]:
    """Measure every row that is not finished, write all files and return the record."""
    from eval import kv_leaderboard_report as report

    if unusable := [*_missing(config), *_too_long(config)]:
        raise ConfigError(unusable)
    check_writable(workdir)
    base = models.load(
        config.model,
        batch_size=config.batch_size,
        max_length=config.context,
        prefill_chunk=config.prefill_chunk,
    )
    finished = _finished(workdir)
    record: dict[str, Any] = {
        **provenance("kv_leaderboard"),
        "device": run.environment()["device"],
        "title": config.title,
        "config": configs.to_dict(config),
        "model": base.describe(),
        "rows": [],
    }
    for row in config.rows:
        key = _key(config, base, row)
        kept = finished.get(key)
        record["rows"].append(
            {**kept, "name": row.name} if kept else _measure(config, base, row, key, workdir)
        )
        _compare(record["rows"], config.baseline_name)
        run.save(record, workdir)
    report.write(record, workdir)
    return record


def problems(config: KvLeaderboardConfig) -> list[str]:
    """Return what would go wrong, as far as nothing need be loaded to tell."""
    found = [f"not found yet: {line}" for line in _missing(config)]
    try:
        found += _too_long(config)
    except CheckpointError as error:
        found.append(str(error))
    for row in config.rows:
        try:
            policy_of(row)
        except ConfigError as error:
            found += [f"{row.name}: {line}" for line in error.problems]
    return found


def _missing(config: KvLeaderboardConfig) -> list[str]:
    """List files and folders that the configuration names and that do not exist."""
    found, path = [], config.model.path
    if not Path(path).exists():
        found.append(f"model.path: no such folder {path!r}")
    for section in ("perplexity", "retrieval"):
        for index, task in enumerate(getattr(config, section)):
            found += run.missing_files(task, f"{section}.{index}")
    named = dict.fromkeys(str(row.settings.get("calibration") or "") for row in config.rows)
    return found + [
        f"caches: no such calibration file {file!r}; `kind: calibrate` of train writes one"
        for file in named
        if file and not Path(file).is_file()
    ]


def _too_long(config: KvLeaderboardConfig) -> list[str]:
    """List every length that is more than the model can be fed, if the model is there."""
    if not Path(config.model.path).exists():
        return []
    name, positions = config.model.name, models.locate(config.model).config.max_positions
    found = run.too_long(config, "context", name, positions)
    for index, task in enumerate(config.perplexity):
        found += run.too_long(task, f"perplexity.{index}.context", name, positions)
    context = config.context or positions
    if config.speed is not None and config.speed.new_tokens >= context:
        found.append(
            f"speed.new_tokens={config.speed.new_tokens} leaves no room for a prompt in a context "
            f"of {context}; use fewer"
        )
    return found


def policy_of(row: CacheRow) -> kvcache.KVCache:
    """Return a row's policy; ConfigError lists what is wrong with its settings."""
    return configs.load(kvcache.CacheConfig, row.settings)  # type: ignore[arg-type]


def _measure(
    config: KvLeaderboardConfig, base: LoadedModel, row: CacheRow, key: str, workdir: Path
) -> Row:
    """Measure one cache; whatever goes wrong is told in its row."""
    result: Row = {"name": row.name, "kind": row.settings["kind"], "settings": row.settings}
    result |= {"key": key, "status": "ok", "error": ""}
    result |= {"bytes": None, "perplexity": {}, "retrieval": {}, "speed": None}
    began, stage = time.perf_counter(), "settings"
    try:
        model = measures.with_cache(base, row.name, policy_of(row), key)
        for section, name, work in measures.stages(config, model, workdir):
            stage = name or section
            _LOG.info("%s: %s", row.name, stage)
            if name:
                result[section][name] = work()
            else:
                result[section] = work()
    except Exception as error:
        trace = None if isinstance(error, ValueError) else error
        _LOG.error("%s failed at %s: %s", row.name, stage, error, exc_info=trace)
        result |= {"status": "failed", "error": f"{stage}: {type(error).__name__}: {error}"}
    # Programs of one cache are of no use to the next, and there may be dozens of caches.
    jax.clear_caches()
    result["seconds"] = time.perf_counter() - began
    result["load_average"] = os.getloadavg()[0]
    return result


def _key(config: KvLeaderboardConfig, base: LoadedModel, row: CacheRow) -> str:
    """Hash what a row's figures depend on; names, order and other rows do not matter."""
    settings = configs.to_dict(config)
    kept = {name: value for name, value in settings.items() if name not in _NOT_MEASURED}
    files = [path for task in config.tasks for _, path in run.files_of(task)]
    files += filter(None, [row.settings.get("calibration")])
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files]
    parts = [base.fingerprint, row.settings, kept, digests]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(workdir: Path) -> dict[str, Row]:
    """Return the good rows of an earlier run by key."""
    try:
        record = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
        return {row["key"]: row for row in record["rows"] if row["status"] == "ok"}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s is unreadable (%s); every row is measured", workdir, error)
        return {}


def _compare(rows: list[Row], baseline: str | None) -> None:
    """Set each row's change of perplexity against the baseline; None where that is not known."""
    base = next((row for row in rows if row["name"] == baseline), None)
    for row in rows:
        for name, metrics in row["perplexity"].items():
            known = base["perplexity"].get(name) if base else None
            level = known and known["perplexity"]
            value = metrics["perplexity"]
            metrics["change"] = None if not level or value is None else value - level
