# SPDX-License-Identifier: Apache-2.0
"""Decoder models and emulators: configuration, definition, presets and parameter layouts."""

from typing import TYPE_CHECKING

from sqzjax._lazy import lazy

if TYPE_CHECKING:
    from sqzjax.models.config import Execution, ModelConfig, RopeConfig, SpecialTokens
    from sqzjax.models.decoder import DecoderLM, DecoderOutput
    from sqzjax.models.fit import fingerprint, fit_cache
    from sqzjax.models.layout import stack_layers, unstack_layers
    from sqzjax.models.sizes import SIZES
    from sqzjax.models.swin import SwinEmulator
    from sqzjax.models.swin_config import SwinConfig

__all__ = [
    "SIZES",
    "DecoderLM",
    "DecoderOutput",
    "Execution",
    "ModelConfig",
    "RopeConfig",
    "SpecialTokens",
    "SwinConfig",
    "SwinEmulator",
    "fingerprint",
    "fit_cache",
    "stack_layers",
    "unstack_layers",
]

__getattr__ = lazy(
    __name__,
    {
        "DecoderLM": "decoder",
        "DecoderOutput": "decoder",
        "Execution": "config",
        "ModelConfig": "config",
        "RopeConfig": "config",
        "SpecialTokens": "config",
        "SIZES": "sizes",
        "SwinConfig": "swin_config",
        "SwinEmulator": "swin",
        "fingerprint": "fit",
        "fit_cache": "fit",
        "stack_layers": "layout",
        "unstack_layers": "layout",
    },
)
