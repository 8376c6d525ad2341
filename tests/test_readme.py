# SPDX-License-Identifier: Apache-2.0
"""Figures in the README come from committed measurements."""

import json
from pathlib import Path

from eval.speed import comparison

ROOT = Path(__file__).resolve().parents[1]


def test_the_speed_table_is_that_of_the_committed_record():
    record = json.loads((ROOT / "eval/results/speed_cpu.json").read_text())
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- speed: begin -->")[1].split("<!-- speed: end -->")[0]
    assert comparison(record) in shown
    assert f"{record['load_average']:.1f}" in shown
    for row in record["training"]:
        if row["model"] != "stories260k":
            assert f"{row['mfu_percent']:.0f} %" in shown
