# SPDX-License-Identifier: Apache-2.0
"""What a comparison of autoregressive and diffusion decoding computes. Imports no jax."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.speed_config import SpeedModel
from sqzjax.analysis import DEVICES, Hardware
from sqzjax.analysis.regimes import StepOptions


def _different(name: str, values: Sequence[int], least: int = 1) -> None:
    if not values or min(values) < least or len(set(values)) < len(values):
        raise ValueError(
            f"{name}={tuple(values)} must be different numbers >= {least}, at least one"
        )


@dataclass(frozen=True, kw_only=True)
class ArmVsDlmConfig:
    """Predicted cost of an autoregressive and of diffusion models; no weights are needed.

    Every pass is computed for all `contexts` (tokens before those being generated), `blocks` and
    `batches` on `devices` (names of `sqzjax.analysis.DEVICES`, or of `custom_devices`). A step over
    the whole sequence generates `response` tokens together. A denoising step finishes
    `tokens_per_step` tokens of a sequence, an assumption that quality decides. Whole generations
    are one sequence long in `prompts` and `lengths`, in blocks of `generation_block`. The batch
    from which autoregressive decoding is faster is searched up to `largest_batch`. A model is a
    named size, an architecture, or a Hugging Face folder, of which only `config.json` is read;
    contexts beyond what it was trained for are computed like any other. `measure` times steps of a
    small model on this machine and fits a floor and a slope.
    """

    kind: Literal["arm_vs_dlm"] = "arm_vs_dlm"
    autoregressive: SpeedModel = SpeedModel(name="llama3_8b")
    diffusion: tuple[SpeedModel, ...] = (SpeedModel(name="llada_8b"), SpeedModel(name="sdar_8b"))
    devices: tuple[str, ...] = ("A100 80GB", "H200", "TPU v6e")
    custom_devices: tuple[Hardware, ...] = ()
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    blocks: tuple[int, ...] = (4, 32, 64)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    response: int = 512
    tokens_per_step: float = 2.0
    prompts: tuple[int, ...] = (128, 2048, 16384)
    lengths: tuple[int, ...] = (128, 512, 2048)
    generation_block: int = 32
    largest_batch: int = 1024
    step: StepOptions = StepOptions()
    measure: bool = False
    title: str = "Autoregressive and diffusion decoding"
    workdir: str = "runs/arm_vs_dlm"

    def __post_init__(self) -> None:
        for name in ("contexts", "blocks", "batches", "prompts", "lengths"):
            _different(name, getattr(self, name))
        for name in ("response", "generation_block", "largest_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        uneven = [length for length in self.lengths if length % self.generation_block]
        if uneven:
            raise ValueError(
                f"lengths={self.lengths} must be multiples of generation_block="
                f"{self.generation_block}, which {uneven[0]} is not; choose another of the two"
            )
        least = min(*self.blocks, self.generation_block, self.response)
        if not 0 < self.tokens_per_step <= least:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} must lie in (0, {least}], the smallest of "
                "blocks, generation_block and response; lower it or leave out small blocks"
            )
        names = [model.name for model in self.diffusion]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"diffusion={names} must name at least one model, each once")
        self._check_devices()

    def _check_devices(self) -> None:
        known = {**DEVICES, **{device.name: device for device in self.custom_devices}}
        unknown = sorted(set(self.devices) - set(known))
        if unknown:
            raise ValueError(
                f"devices={unknown} are not known; use names of {sorted(known)}, or describe them "
                "under custom_devices (name, bandwidth in bytes/s, peak_flops in operations/s)"
            )
        if not self.devices or len(set(self.devices)) < len(self.devices):
            raise ValueError(f"devices={self.devices} must name at least one device, each once")

    @property
    def hardware(self) -> tuple[Hardware, ...]:
        """Records of the devices; a custom one replaces a known one of its name."""
        known = {**DEVICES, **{device.name: device for device in self.custom_devices}}
        return tuple(known[name] for name in self.devices)
