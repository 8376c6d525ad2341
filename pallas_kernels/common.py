# SPDX-License-Identifier: Apache-2.0
"""What every operation shares: the device to compile for, the choice of a backend, tuned sizes.

An operation has one public function. It checks its input (`ValueError`), then hands `dispatch` one
thunk per backend; a backend says `NotImplementedError` when it cannot do a shape, dtype or device,
and nothing else makes the next one be tried. Imports jax and numpy alone; no accelerator wheel is
loaded before a kernel is compiled for it.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeVar

import jax
import numpy as np

T = TypeVar("T")
Backend = Literal["auto", "mosaic_gpu", "mosaic_tpu", "xla"]
BACKENDS = ("mosaic_gpu", "mosaic_tpu", "xla")
"""In the order in which "auto" tries them; the last runs everywhere."""

MASK_VALUE = float(np.float32(-0.7 * np.finfo(np.float32).max))
"""Score of a masked position. Finite, so that a fully masked row stays free of NaN."""

_PLATFORM = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}


@dataclass(frozen=True)
class Target:
    """The device that a program is being traced for.

    `platform` is "cpu", "gpu" or "tpu"; `kind` jax's device kind; `capability` the CUDA compute
    capability, None elsewhere; `cores` the streaming multiprocessors or TPU cores, if known.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None = None
    cores: int | None = None


def current_target() -> Target:
    """Return the device described by the current abstract mesh, else jax's default device.

    Compilation without the hardware describes it by `jax.sharding.use_abstract_mesh`.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    cores = getattr(device, "num_cores", None)
    if device is None:
        default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
        device = jax.devices(default)[0] if isinstance(default, str) else default
        device = device or jax.devices()[0]
        cores = getattr(device, "core_count", None)
    platform = "gpu" if device.platform == "cuda" else device.platform
    capability = getattr(device, "compute_capability", None)
    if platform == "gpu" and capability is not None:
        major, minor = str(capability).split(".")[:2]
        return Target(platform, device.device_kind, (int(major), int(minor)), cores)
    return Target(platform, device.device_kind, None, cores)


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[[], T]],
    *,
    backend: str = "auto",
    target: Target,
    interpret: Any = None,
    config: Any = None,
) -> T:
    """Return the result of the first implementation that can run, or of the one named.

    `implementations` are thunks by backend name, in the order of preference. `interpret` other
    than None or False lets a named kernel run without its device; `config`, its tile sizes, goes
    with a named kernel too.
    """
    names = ("auto", *implementations)
    if backend not in names:
        raise ValueError(f"backend={backend!r} is unknown to {op}; use one of {', '.join(names)}")
    for name, value in (("interpret", interpret), ("config", config)):
        if value and backend not in _PLATFORM:
            raise ValueError(
                f"{name}={value!r} needs the backend that it is for; name backend='mosaic_gpu' or "
                f"'mosaic_tpu' instead of {backend!r}"
            )
    reasons, cause = [], None
    for name in implementations if backend == "auto" else (backend,):
        try:
            _check_device(name, target, bool(interpret))
            return implementations[name]()
        except NotImplementedError as error:
            reasons.append(str(error))
            cause = error
    advice = "use backend='auto' or 'xla'" if backend != "auto" else "see the reasons"
    message = f"backend={backend!r} cannot run {op} here: {'; '.join(reasons)}; {advice}"
    raise ValueError(message) from cause


def _check_device(name: str, target: Target, interpret: bool) -> None:
    platform = _PLATFORM.get(name)
    if platform is None or interpret:
        return
    if target.platform != platform:
        raise NotImplementedError(f"{name}: needs a {platform.upper()}, not a {target.platform}")
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [mesh.shape[axis] for axis in mesh.auto_axes]
    if any(size > 1 for size in automatic):
        # The partitioner would gather the operands of an opaque kernel on every device.
        raise NotImplementedError(f"{name}: call it inside jax.shard_map over a mesh")


def check(name: str, value: object, good: bool, rule: str) -> None:
    """Raise ValueError naming an argument, its value and the rule (with the remedy) it broke."""
    if not good:
        raise ValueError(f"{name}={value!r} {rule}")


def check_integers(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless an argument is an array of integers of a shape."""
    kind = getattr(value, "dtype", None)
    good = kind is not None and np.issubdtype(kind, np.integer)
    rule = "must be an array of integers; make it with jnp.asarray(..., jnp.int32)"
    check(name, value if kind is None else str(kind), good, rule)
    check(f"{name}.shape", value.shape, value.shape == shape, f"must be {shape}")


def round_up(value: int, multiple: int) -> int:
    """Return the lowest multiple of `multiple` that is >= `value`."""
    return -(-value // multiple) * multiple


def device_slug(kind: str) -> str:
    """Return a device kind as a file name: "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def tuned(op: str, key: str, target: Target) -> dict[str, int] | None:
    """Return the measured sizes of `op` for a shape key on this kind of device, if there are any.

    `tuning/<device>.json` holds `{op: {key: {size: value}}}`; `python -m pallas_kernels.tune`
    writes it.
    """
    return tuning_table(target.kind).get(op, {}).get(key)


@functools.cache
def tuning_table(kind: str) -> dict[str, dict[str, dict[str, int]]]:
    """Return all measured sizes of a kind of device; empty without a file."""
    file = resources.files("pallas_kernels") / "tuning" / f"{device_slug(kind)}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
