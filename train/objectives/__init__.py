# SPDX-License-Identifier: Apache-2.0
"""Training objectives; to add one, write a module and extend the union."""

from train.objectives.base import LossOutput, Objective, Reference
from train.objectives.cdlm import CDLM
from train.objectives.diffusion import BlockDiffusion, MaskedDiffusion
from train.objectives.forecast import Forecast
from train.objectives.lm import LanguageModeling
from train.objectives.rcd import RCD

ObjectiveConfig = LanguageModeling | MaskedDiffusion | BlockDiffusion | RCD | CDLM | Forecast
"""Every objective a configuration file can name by `kind`."""

__all__ = [
    "CDLM",
    "RCD",
    "BlockDiffusion",
    "Forecast",
    "LanguageModeling",
    "LossOutput",
    "MaskedDiffusion",
    "Objective",
    "ObjectiveConfig",
    "Reference",
]
