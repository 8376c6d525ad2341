# SPDX-License-Identifier: Apache-2.0
"""TPU slices that need not be here: their names and figures, and processes that compile for them.

libtpu reads its environment once, and a compiler that fails may take its process along, so
programs are compiled in a child (`sqzjax.analysis.aot`). Nothing here imports jax.
"""

import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqzjax.analysis.devices import DEVICES, Hardware
from sqzjax.errors import ConfigError

MAX_CHIPS = 256
CHIPS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}
"""Chip names of topologies, and their records in `sqzjax.analysis.DEVICES`."""

_NAME = re.compile(r"(v\w+):(\d+(?:x\d+){1,2})")
_LOG = logging.getLogger(__name__)
# What libtpu asks of a machine without a TPU; several processes may compile at once.
_COMPILE_ONLY = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Topology:
    """A chip (v4, v5e, v5p, v6e) and the size of its torus: `v5p:4x4x4`."""

    name: str

    def __post_init__(self) -> None:
        found = _NAME.fullmatch(self.name)
        if found is None or found[1] not in CHIPS:
            raise ValueError(
                f"topology={self.name!r} must be one of {', '.join(CHIPS)}, a colon and the "
                "size of the torus; for example v5p:4x4x4 or v5e:8x8"
            )
        if not 1 <= self.num_chips <= MAX_CHIPS:
            raise ValueError(
                f"topology={self.name!r} has {self.num_chips} chips and must have 1 to "
                f"{MAX_CHIPS}; plan another slice"
            )

    @property
    def num_chips(self) -> int:
        """Chips; on every kind here a chip is one device."""
        return math.prod(int(size) for size in self.name.partition(":")[2].split("x"))

    @property
    def hardware(self) -> Hardware:
        """Peak figures of one chip."""
        return DEVICES[CHIPS[self.name.partition(":")[0]]]


def check_compiler(what: str) -> None:
    """Raise ConfigError without the TPU compiler, which `what` needs; nothing is imported."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"{what} compiles for TPUs and needs the package libtpu, which is not installed; "
            "run pip install 'sqzjax[aot-tpu]' (no TPU is needed)"
        )


def compile_environment(inherited: Mapping[str, str], root: Path) -> dict[str, str]:
    """Return the environment of a process that compiles for a TPU which is not there.

    Modules are found in `root` first.
    """
    kept = {name: value for name, value in inherited.items() if not name.startswith("TPU_")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), kept.get("PYTHONPATH", "")]))
    return kept | _COMPILE_ONLY


def compile_in_child(
    module: str, request: Mapping[str, Any], environment: Mapping[str, str], timeout_s: int
) -> dict[str, Any]:
    """Return the answer of `python -m module REQUEST.json RESULT.json` (`aot.answer`).

    "status" is "ok", "too large", "bad config" or, after a crash or a timeout, "failed", with the
    child's last words as "error".
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request))
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, str(asked), str(answer)],
                env=dict(environment),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "error": f"no result within {timeout_s} seconds"}
        if answer.is_file():
            return json.loads(answer.read_text())
        _LOG.error("the compiler failed (exit code %d):\n%s", done.returncode, done.stderr[-4000:])
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"status": "failed", "error": f"exit code {done.returncode}: {last[:500]}"}
