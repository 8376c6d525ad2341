# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding in Hugging Face configs: `rope_theta` + `rope_scaling`, or `rope_parameters`.

Kinds default, linear, llama3 and yarn; any other is refused, because ignoring one (dynamic,
longrope, mrope) would compute another model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqzjax.io.fields import Fields, show
from sqzjax.models.config import RopeConfig

_ORIGINAL = "original_max_position_embeddings"
_USED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_positions",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_positions",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Fields of `RopeConfig` that each kind reads, theta apart."""
_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}
_KNOWN = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "finetuned",
    _ORIGINAL,
}
_KNOWN |= {name for names in _USED.values() for name in names}
_MAX_POSITIONS = 1 << 30


def read(fields: Fields, max_positions: int) -> RopeConfig:
    """Read either spelling; where a file has both they must agree, null aside."""
    old, new = fields.sub("rope_scaling"), fields.sub("rope_parameters")
    theta = _theta(fields, old, new)
    found = [_scaling(part, theta, max_positions, fields) for part in (old, new) if part.raw]
    found = found or [RopeConfig(theta=theta)]
    if old.raw and new.raw and found[0] != found[-1]:
        fields.problem("rope_scaling and rope_parameters disagree; keep one of them")
    for part in (fields, old, new):
        part.only("partial_rotary_factor", 1.0)
    return found[-1]


def _theta(fields: Fields, *parts: Fields) -> float:
    said = [part for part in (fields, *parts) if part.raw.get("rope_theta") is not None]
    values = [part.number("rope_theta") for part in said]
    if len(set(values)) > 1:
        fields.problem(f"rope_theta has different values in one file: {values}")
    theta = values[0] if values else 10_000.0
    if theta <= 1.0:
        fields.problem(f"rope_theta={theta} must be above 1; Llama uses 10000.0")
        return 10_000.0
    return theta


def _scaling(part: Fields, theta: float, max_positions: int, fields: Fields) -> RopeConfig:
    raw = part.raw
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if not isinstance(kind, str) or kind not in _USED:
        part.problem(f"rope type {show(kind)} is not supported; use one of {', '.join(_USED)}")
        return RopeConfig(theta=theta)
    unknown = sorted(set(raw) - _KNOWN)
    if unknown:
        part.problem(f"rope parameters {show(unknown)} are not supported")
    used = _USED[kind]
    values: dict[str, Any] = {}
    if "original_max_positions" in used:
        # As in transformers: yarn falls back to the model's own length, llama3 must say it.
        default = max_positions if kind == "yarn" else None
        top, own = fields.raw.get(_ORIGINAL), raw.get(_ORIGINAL)
        if top and own and top != own:
            # Which of the two counts depends on the release of transformers.
            part.problem(f"{_ORIGINAL} has different values in one file: {show([top, own])}")
        values["original_max_positions"] = part.integer(
            _ORIGINAL, 1, _MAX_POSITIONS, top or default
        )
    for name in used:
        if name in ("attention_factor", "mscale", "mscale_all_dim"):
            values[name] = part.optional_number(name)
        elif name == "truncate":
            values[name] = part.boolean(name, True)
        elif name != "original_max_positions":
            values[name] = part.number(name, _DEFAULTS.get(name))
    try:
        return RopeConfig(theta=theta, kind=kind, **values)  # type: ignore[arg-type]
    except ValueError as error:
        part.problem(str(error))
        return RopeConfig(theta=theta)


def canonical(rope: RopeConfig) -> RopeConfig:
    """Reset the fields that `rope.kind` does not read, except a factor on cos and sin."""
    kept = {name: getattr(rope, name) for name in (*_USED[rope.kind], "attention_factor")}
    return replace(RopeConfig(), theta=rope.theta, kind=rope.kind, **kept)


def write(rope: RopeConfig) -> dict[str, Any]:
    """Return the keys of both spellings."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for name in _USED[rope.kind]:
        value = getattr(rope, name)
        if value is not None:
            scaling[_ORIGINAL if name == "original_max_positions" else name] = value
    old: Mapping[str, Any] | None = {"type": rope.kind, **scaling} if len(scaling) > 1 else None
    return {
        "rope_theta": rope.theta,
        "rope_scaling": old,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
