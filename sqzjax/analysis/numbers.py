# SPDX-License-Identifier: Apache-2.0
"""The number type of the analysis: counts stay exact integers where the formats allow it."""

Number = int | float
