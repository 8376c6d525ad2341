# SPDX-License-Identifier: Apache-2.0
"""Training objectives; to add one, write a module and extend the union."""

from train.objectives.base import LossOutput, Objective, Reference
from train.objectives.diffusion import BlockDiffusion, MaskedDiffusion
from train.objectives.lm import LanguageModeling

ObjectiveConfig = LanguageModeling | MaskedDiffusion | BlockDiffusion
"""Every objective a configuration file can name by `kind`."""

__all__ = [
    "BlockDiffusion",
    "LanguageModeling",
    "LossOutput",
    "MaskedDiffusion",
    "Objective",
    "ObjectiveConfig",
    "Reference",
]
