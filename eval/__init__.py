# SPDX-License-Identifier: Apache-2.0
"""Evaluation: quality, speed, reports and their command line (`python -m eval`)."""
