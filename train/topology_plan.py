# SPDX-License-Identifier: Apache-2.0
"""Will a run fit on TPU chips that are not here? `--dry-run --topology v5p:4x4x4` compiles it.

The real training step is compiled from shapes in a child process, a minute or two for 8B
parameters; the bytes are XLA's own memory analysis of one device. Needs the TPU compiler (package
libtpu, extra `aot-tpu`).
"""

import os
import sys
from pathlib import Path
from typing import Any

from sqzjax import config as configs
from sqzjax.analysis.topology import (
    Topology,
    check_compiler,
    compile_environment,
    compile_in_child,
)
from sqzjax.cli import EXIT_FAILED, EXIT_OK
from sqzjax.errors import ConfigError
from train.config import TrainConfig
from train.plan import readable

_ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 3600


def run(config: TrainConfig, *, topology: str) -> int:
    """Print the resolved configuration and what its step takes on each chip of `topology`."""
    result = plan(config, topology)
    sys.stdout.write(f"{configs.dump(config)}\n{describe(result, topology)}\n")
    return EXIT_FAILED if result["status"] == "failed" else EXIT_OK


def plan(config: TrainConfig, topology: str) -> dict[str, Any]:
    """Compile the step for a topology; ConfigError where the run does not suit it.

    Returns the child's answer (`sqzjax.analysis.topology.compile_in_child`), with the bytes
    "needed" of a device and whether it "fits" when that is known.
    """
    check_compiler("--topology")
    try:
        slice_ = Topology(topology)
        config.resolve_model()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    request = {"config": configs.to_dict(config), "topology": topology}
    environment = compile_environment(os.environ, _ROOT)
    result = compile_in_child("train.plan_compile", request, environment, TIMEOUT_S)
    if result["status"] == "bad config":
        raise ConfigError(result["error"])
    if result["status"] == "too large":
        return result | {"fits": False}
    if result["status"] == "ok":
        needed = result["memory"]["peak"] + result["memory"]["code"]
        return result | {"needed": needed, "fits": needed <= slice_.hardware.memory_bytes}
    return result


def describe(result: dict[str, Any], topology: str) -> str:
    """Return a plan as lines of text."""
    if result["status"] == "failed":
        return f"the step could not be compiled for {topology}: {result['error']}"
    slice_ = Topology(topology)
    mesh = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    room = readable(int(slice_.hardware.memory_bytes))
    lines = [
        ("topology", f"{topology}, {slice_.num_chips} x {slice_.hardware.name} of {room}"),
        ("mesh", f"{mesh} (bytes below are for one of {result['devices']} devices)"),
        *((name, readable(size)) for name, size in result["bytes"].items() if size),
    ]
    if result["status"] == "ok":
        lines += _compiled(result, slice_)
    else:
        told = " ".join(line.strip() for line in result["error"].splitlines()[:2])
        lines += [("fits", f"no: {told}")]
    return "\n".join(f"{name:20}{text}" for name, text in lines)


def _compiled(result: dict[str, Any], topology: Topology) -> list[tuple[str, str]]:
    memory = result["memory"]
    fresh = memory["outputs"] - memory["aliased"]
    share = 100 * result["needed"] / topology.hardware.memory_bytes
    return [
        ("arguments", f"{readable(memory['arguments'])} (all of the above, counted by XLA)"),
        ("temporaries", f"{readable(memory['temporaries'])} (gradients, activations)"),
        ("new outputs", readable(fresh)),
        ("code", readable(memory["code"])),
        ("total", readable(result["needed"])),
        ("fits", f"{'yes' if result['fits'] else 'no'}: {share:.0f} % of a chip's memory"),
        ("compiled in", f"{result['lower_seconds'] + result['compile_seconds']:.0f} s, not run"),
    ]
