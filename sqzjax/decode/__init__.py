# SPDX-License-Identifier: Apache-2.0
"""Decoding: methods, sampling, and the functions that turn prompts into text."""

from typing import TYPE_CHECKING

from sqzjax._lazy import lazy

if TYPE_CHECKING:
    from sqzjax.decode.autoregressive import Autoregressive
    from sqzjax.decode.base import Decoder, Output, Requests, Run, advance, emit, start
    from sqzjax.decode.diffusion import Diffusion, DiffusionConfig
    from sqzjax.decode.generator import Generator, generate, stream_generate
    from sqzjax.decode.outputs import GenerateOutput, GenerateStats, RowUpdate
    from sqzjax.decode.sampling_config import SamplingConfig

__all__ = [
    "Autoregressive",
    "Decoder",
    "Diffusion",
    "DiffusionConfig",
    "GenerateOutput",
    "GenerateStats",
    "Generator",
    "Output",
    "Requests",
    "RowUpdate",
    "Run",
    "SamplingConfig",
    "advance",
    "emit",
    "generate",
    "start",
    "stream_generate",
]

__getattr__ = lazy(
    __name__,
    {
        "Autoregressive": "autoregressive",
        "Decoder": "base",
        "Diffusion": "diffusion",
        "DiffusionConfig": "diffusion",
        "GenerateOutput": "outputs",
        "GenerateStats": "outputs",
        "Generator": "generator",
        "Output": "base",
        "Requests": "base",
        "RowUpdate": "outputs",
        "Run": "base",
        "SamplingConfig": "sampling_config",
        "advance": "base",
        "emit": "base",
        "generate": "generator",
        "start": "base",
        "stream_generate": "generator",
    },
)
