# SPDX-License-Identifier: Apache-2.0
"""How many bytes caches take at any length: `cache_bytes.json` and `cache_bytes.md`.

Sizes follow from the shapes that the caches would allocate (`sqzjax.analysis.cache_bytes`). A
cache that does not suit a model says so in its row.
"""

import json
import logging
from pathlib import Path
from typing import Any

from eval.cache_plan_config import CachePlanConfig
from eval.cache_rows import CacheRow, all_rows
from eval.plan_config import architecture_of
from eval.provenance import provenance
from eval.tables import table
from sqzjax import config as configs
from sqzjax import kvcache
from sqzjax.analysis.cache_bytes import cache_bytes
from sqzjax.io import atomic
from sqzjax.io.lock import check_writable
from sqzjax.models.config import ModelConfig

_LOG = logging.getLogger(__name__)
_GIB = 2**30


def run_cache_plan(config: CachePlanConfig, workdir: Path) -> dict[str, Any]:
    """Compute every size, write both files and return the record."""
    check_writable(workdir)
    record: dict[str, Any] = {
        **provenance("cache_bytes"),
        "config": configs.to_dict(config),
        "rows": [],
    }
    for model in config.models:
        shape = architecture_of(model)
        for cache in all_rows(config.caches):
            record["rows"].append({"model": model.name, **_row(config, shape, cache)})
    atomic.write_text(workdir / "cache_bytes.json", json.dumps(record, indent=1) + "\n")
    atomic.write_text(workdir / "cache_bytes.md", markdown(record))
    _LOG.info("wrote %s", workdir / "cache_bytes.md")
    return record


def _row(config: CachePlanConfig, shape: ModelConfig, cache: CacheRow) -> dict[str, Any]:
    row: dict[str, Any] = {"cache": cache.name, "settings": cache.settings, "error": ""}
    try:
        policy = configs.load(kvcache.CacheConfig, cache.settings)  # type: ignore[arg-type]
        sizes = [
            cache_bytes(
                shape,
                policy,
                context=context,
                batch=config.batch,
                dtype=config.dtype,
                mesh=config.mesh,
            )
            for context in config.contexts
        ]
    except ValueError as error:
        return row | {"error": str(error), "sizes": []}
    found = [
        {
            "context": size.context,
            "total": size.total,
            "average_bits": size.average_bits,
            "device_total": size.device_total,
        }
        for size in sizes
    ]
    return row | {"sizes": found}


def markdown(record: dict[str, Any]) -> str:
    """Return one table a model: GiB at each context, all devices together and one of them."""
    config = record["config"]
    mesh = config["mesh"]
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    columns = [("cache", "cache", "{}"), ("bits", "bits", "{:.2f}")]
    for context in config["contexts"]:
        columns.append((f"{_short(context)} tokens", f"total {context}", "{:,.1f}"))
        if devices > 1:
            columns.append((f"one of {devices} devices", f"device {context}", "{:,.2f}"))
    spread = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    lines = [
        "# Bytes of caches",
        "",
        f"GiB (2^30 bytes) of {config['batch']} sequence(s), every array counted, exact keys and "
        f"values in {config['dtype']}; devices: {spread}. Bits per key or value element at the "
        f"longest context. Commit {record['commit']}, {record['created']}.",
    ]
    for model in config["models"]:
        own = [row for row in record["rows"] if row["model"] == model["name"]]
        lines += ["", f"## {model['name']}", ""]
        lines += table([_flat(row) for row in own if row["sizes"]], columns)
        lines += [f"\n{row['cache']}: {row['error']}" for row in own if row["error"]]
    return "\n".join(lines) + "\n"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {"cache": row["cache"], "bits": row["sizes"][-1]["average_bits"]}
    for size in row["sizes"]:
        flat[f"total {size['context']}"] = size["total"] / _GIB
        flat[f"device {size['context']}"] = size["device_total"] / _GIB
    return flat


def _short(count: int) -> str:
    """Write a number of tokens the way papers do: 128K, 1M (binary) or 10M (decimal)."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count / 1e6:g}M" if count >= 10**6 else f"{count:,}"
