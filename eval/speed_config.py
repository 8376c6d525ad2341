# SPDX-License-Identifier: Apache-2.0
"""What a speed measurement runs. Imports no jax, so that a configuration is checked at once."""

from dataclasses import dataclass
from typing import Literal

from sqzjax.models.config import ModelConfig
from sqzjax.models.sizes import SIZES
from sqzjax.models.swin_config import SwinConfig


@dataclass(frozen=True, kw_only=True)
class SpeedModel:
    """A model to time: a Hugging Face folder, or random weights of a named or given shape.

    Speed does not depend on the values of weights, so random ones serve where none are at hand.
    Give `path` (a checkpoint) or `architecture` (random weights), or neither where `name` is one
    of `sqzjax.models.SIZES` (random weights of that size).
    """

    name: str
    path: str | None = None
    architecture: ModelConfig | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.architecture is not None:
            raise ValueError(f"model {self.name!r} has path and architecture; give one of them")
        if self.path is None and self.architecture is None and self.name not in SIZES:
            raise ValueError(
                f"model name={self.name!r} is no known size; use one of {sorted(SIZES)}, or give "
                "path or architecture"
            )


@dataclass(frozen=True, kw_only=True)
class SpeedEmulator:
    """A Swin emulator whose training step is timed, with random weights and fields."""

    name: str
    architecture: SwinConfig
    batch: int = 16
    remat: Literal["none", "dots", "full"] = "none"
    scan_layers: bool = True

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"emulator {self.name!r}: batch={self.batch} must be >= 1")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Greedy generation speed of each model at each batch size, and of training if asked.

    `repeats` whole generations and one stream are timed after a warm-up, unless `generate` is off.
    `contexts` are cache lengths at which decode steps are timed by themselves, `steps` to a run,
    in caches of random content; `breakdown` profiles them and says which operations the time
    goes to.
    Training steps of `emulators` are timed, too; a configuration may have them alone.
    `train_batch` > 0 times that many sequences of `train_seq_len` through a training step.
    `transformers_python` names the interpreter of an environment with torch and transformers (see
    `eval.bench_transformers`): the same prompts then run there in turn with ours, once for each
    of `transformers_caches`, on `threads` threads (0: as many as this process may use).
    """

    kind: Literal["speed"] = "speed"
    models: tuple[SpeedModel, ...] = ()
    emulators: tuple[SpeedEmulator, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    prompt_len: int = 16
    new_tokens: int = 256
    repeats: int = 5
    generate: bool = True
    contexts: tuple[int, ...] = ()
    steps: int = 16
    breakdown: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    train_batch: int = 0
    train_seq_len: int = 256
    transformers_python: str | None = None
    transformers_caches: tuple[Literal["dynamic", "static", "compiled"], ...] = (
        "dynamic",
        "static",
    )
    threads: int = 0
    seed: int = 0
    workdir: str = "runs/speed"

    def __post_init__(self) -> None:
        minimum = {"prompt_len": 1, "new_tokens": 3, "repeats": 1, "train_seq_len": 2}
        minimum |= {"train_batch": 0, "threads": 0, "steps": 1}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {least}")
        if not (self.models or self.emulators):
            raise ValueError("models=() and emulators=() must name at least one model")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches={self.batches} must be one or more numbers >= 1")
        if self.contexts and min(self.contexts) < 1:
            raise ValueError(f"contexts={self.contexts} must be numbers >= 1")
        asked = self.generate or self.contexts or self.train_batch or self.transformers_python
        if self.models and not asked:
            raise ValueError(
                "generate=False and contexts=() leave nothing to measure; name contexts, for "
                "example [2048, 8192]"
            )
        names = [entry.name for entry in (*self.models, *self.emulators)]
        if len(set(names)) < len(names):
            raise ValueError(f"model names {names} must differ; they label the results")
        if self.transformers_python and self.dtype != "float32":
            raise ValueError(
                f"dtype={self.dtype!r} must be 'float32' to compare with transformers, which the "
                "worker runs in float32"
            )
