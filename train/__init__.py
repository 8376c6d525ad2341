# SPDX-License-Identifier: Apache-2.0
"""Training: data, objectives, the loop and its command line (`python -m train`)."""
