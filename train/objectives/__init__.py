# SPDX-License-Identifier: Apache-2.0
"""Training objectives; to add one, write a module and extend the union."""

from train.objectives.base import LossOutput, Objective
from train.objectives.lm import LanguageModeling

ObjectiveConfig = LanguageModeling
"""Every objective a configuration file can name by `kind`."""

__all__ = ["LanguageModeling", "LossOutput", "Objective", "ObjectiveConfig"]
