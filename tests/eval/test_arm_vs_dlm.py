# SPDX-License-Identifier: Apache-2.0
"""The comparison of autoregressive and diffusion decoding: command, record, page, findings."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from eval import arm_vs_dlm, arm_vs_dlm_measure, arm_vs_dlm_report
from eval.__main__ import PROGRAM
from eval.arm_vs_dlm_config import ArmVsDlmConfig
from eval.speed_config import SpeedModel
from sqzjax import cli
from sqzjax.analysis import DEVICES, Hardware
from sqzjax.analysis.crossover import Contest, generation, plan_batches
from sqzjax.analysis.regimes import regime
from sqzjax.config import load, to_dict
from sqzjax.models.sizes import SIZES
from tests import tolerances

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "configs/eval/arm_vs_dlm.yaml"
RECORD = ROOT / "eval/results/arm_vs_dlm.json"
SMALL = """\
kind: arm_vs_dlm
autoregressive: {name: llama3.2_1b}
diffusion:
  - {name: sdar_1.7b}
devices: [H200, mine]
custom_devices:
  - {name: mine, bandwidth: 1.0e+11, peak_flops: 2.0e+13, memory_bytes: 4.0e+9}
contexts: [256, 4096]
blocks: [4, 16]
batches: [1, 16]
response: 64
tokens_per_step: 2
prompts: [64, 128]
lengths: [64]
generation_block: 16
largest_batch: 64
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arm_vs_dlm")
    (folder / "small.yaml").write_text(SMALL)
    workdir = folder / "work"
    arguments = [str(folder / "small.yaml"), "--workdir", str(workdir), "step.floor_seconds=1e-4"]
    assert cli.main(PROGRAM, arguments) == 0
    record = json.loads((workdir / "results.json").read_text())
    return load(ArmVsDlmConfig, folder / "small.yaml", arguments[3:]), record, workdir


def test_every_combination_is_there_and_is_what_the_library_says(made):
    config, record, _ = made
    rows = arm_vs_dlm.expand(record, "steps")
    # Contexts x batches x devices; blocks: prefill and decode 1, whole sequence 1, blocks 2 each.
    assert len(rows) == 2 * 2 * 2 * (1 + 1 + 1 + 2 + 2)
    for row in rows:
        step = regime(
            SIZES[row["model"]],
            row["regime"],
            context=row["context"],
            new=row["block"],
            batch=row["batch"],
            hardware=config.hardware[row["device"] == "mine"],
            options=config.step,
        )
        passes = row["tokens_per_pass"]
        got = [row[k] for k in ("ms", "intensity", "gbyte", "ms_per_token", "tokens_per_second")]
        expected = [1e3 * step.seconds, step.intensity, step.bytes / 1e9]
        expected += [1e3 * step.seconds / passes, row["batch"] * passes / step.seconds]
        np.testing.assert_allclose(got, expected, rtol=tolerances.FOUR_DIGITS)
        assert row["bound"] == step.bound and row["fed"] == step.fed
    assert {row["fits"] for row in rows} == {True, False}
    # A block of 4 at 2 tokens a step: two steps and the pass that stores it.
    yielded = {(r["regime"], r["block"]): r["tokens_per_pass"] for r in rows}
    assert yielded["block_cached", 4] == pytest.approx(4 / 3, rel=tolerances.FOUR_DIGITS)
    assert yielded["block_uncached", 4] == 2 and yielded["arm_decode", 1] == 1


def test_contests_generations_and_plans_are_what_the_library_says(made):
    config, record, _ = made
    dlm, arm = SIZES["sdar_1.7b"], SIZES["llama3.2_1b"]
    devices = {device.name: device for device in config.hardware}
    rows = arm_vs_dlm.expand(record, "contests")
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        contest = Contest(
            arm=arm,
            dlm=dlm,
            name=row["regime"],
            context=row["context"],
            new=row["block"],
            hardware=devices[row["device"]],
            options=config.step,
        )
        assert row["crossing_batch"] == contest.crossing_batch(2, 64)
        ratios = [contest.ratio(batch) for batch in config.batches]
        np.testing.assert_allclose(row["break_even"], ratios, rtol=tolerances.FOUR_DIGITS)
    for row in arm_vs_dlm.expand(record, "generations"):
        whole = generation(
            arm if row["regime"] == "arm_decode" else dlm,
            row["regime"],
            prompt=row["prompt"],
            length=row["length"],
            block=16,
            tokens_per_step=2,
            hardware=devices[row["device"]],
            options=config.step,
        )
        assert row["seconds"] == pytest.approx(whole.seconds, rel=tolerances.FOUR_DIGITS)
        assert row["passes"] == whole.passes
    for row in arm_vs_dlm.expand(record, "plans"):
        plan = plan_batches(
            dlm,
            devices[row["device"]],
            context=row["context"],
            blocks=config.blocks,
            batches=arm_vs_dlm.PLAN_BATCHES,
            options=config.step,
        )
        reached = [pair and pair["batch"] for pair in row["reaching"]]
        assert reached == [pair and pair.batch for pair in plan.reaching.values()]


def test_page_shows_every_section_and_figure(made):
    _, record, workdir = made
    page = (workdir / "report.html").read_text()
    for title in (
        "Findings",
        "Roofline",
        "Steps on H200",
        "Steps on mine",
        "Break-even and crossing batch",
        "Whole generations",
        "Batch planner",
        "Head and sampling",
        "Settings",
    ):
        assert f"<h2>{title}</h2>" in page
    assert "Measured here" not in page and "http" not in re.sub(r"<pre>.*?</pre>", "", page)
    pytest.importorskip("matplotlib")
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 1 + 2 * 3 + 2 + 1
    for drawing in drawings:
        assert ET.fromstring(drawing).findall(".//path")
    for line in arm_vs_dlm_report.findings(record):
        assert line in page


def test_dry_run_prints_the_config_and_writes_nothing(tmp_path, capsys):
    assert cli.main(PROGRAM, [str(SHIPPED), "--dry-run", "--workdir", str(tmp_path / "x")]) == 0
    assert "kind: arm_vs_dlm" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("devices=[H300]", "devices=['H300'] are not known"),
        ("devices=[]", "devices=() must name at least one"),
        ("contexts=[0]", "contexts=(0,) must be different numbers >= 1"),
        ("batches=[8, 8]", "batches=(8, 8)"),
        ("tokens_per_step=5", "tokens_per_step=5.0 must lie in (0, 4]"),
        ("tokens_per_step=0", "tokens_per_step=0.0"),
        ("lengths=[100]", "multiples of generation_block=32"),
        ("response=0", "response=0 must be >= 1"),
        ("diffusion=[]", "diffusion=[]"),
        ("autoregressive.name=llama9", "llama9"),
        ("step.density=0", "density=0 must lie in (0, 1]"),
        ("step.floor_seconds=-1", "floor_seconds=-1"),
        ("step.precision.kv_bits=0", "kv_bits=0"),
        ("step.sampling_bits=16", "sampling_bits"),
        ("blocks=64", "blocks"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(override, message, tmp_path, capsys):
    folder = tmp_path / "out"
    assert cli.main(PROGRAM, [str(SHIPPED), override, "--workdir", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_devices_can_be_described_and_replaced():
    mine = Hardware(name="H200", bandwidth=1e12, peak_flops=1e14)
    config = ArmVsDlmConfig(devices=("H200", "A6000"), custom_devices=(mine,))
    assert config.hardware == (mine, DEVICES["A6000"])


def test_fit_recovers_floor_and_slope():
    fed = (1, 2, 4, 8, 16)
    floor, slope = arm_vs_dlm_measure.fit(fed, [3e-3 + 2e-4 * tokens for tokens in fed])
    assert floor == pytest.approx(3e-3) and slope == pytest.approx(2e-4)


@pytest.mark.slow
def test_measuring_times_every_size_and_is_reported(made):
    model = dataclasses.replace(arm_vs_dlm_measure.MODEL, num_layers=1, hidden_size=64)
    kept = arm_vs_dlm_measure.measure(model=model, fed=(1, 64), rounds=2)
    assert kept["fed"] == [1, 64] and len(kept["ms"]) == 2 and min(kept["ms"]) > 0
    np.testing.assert_allclose(
        [kept["floor_ms"] + kept["slope_ms"] * tokens for tokens in kept["fed"]],
        kept["ms"],
        rtol=tolerances.THREE_DIGITS,
    )
    with pytest.raises(ValueError, match="rounds=0"):
        arm_vs_dlm_measure.measure(rounds=0)
    record = made[1] | {"measured": kept}
    assert "<h2>Measured here</h2>" in arm_vs_dlm_report.render(record)
    assert "Measured, a 1-layer model" in arm_vs_dlm_report.findings(record)[-1]


# ---------------------------------------------------------------------------- committed record


def test_committed_record_is_that_of_the_shipped_config():
    record = json.loads(RECORD.read_text())
    config = load(ArmVsDlmConfig, SHIPPED)
    assert record["config"] == json.loads(json.dumps(to_dict(config))) | {"measure": True}
    assert RECORD.stat().st_size < 60_000
    # A part is computed again: all of it takes a second, half a minute with run-time type checks.
    part = dataclasses.replace(
        config,
        devices=config.devices[:1],
        contexts=config.contexts[-1:],
        prompts=config.prompts[:1],
        lengths=config.lengths[:2],
    )
    arm = SIZES[config.autoregressive.name]
    models = {entry.name: SIZES[entry.name] for entry in config.diffusion}
    again = {
        "steps": arm_vs_dlm._steps(part, arm, models),
        "contests": arm_vs_dlm._contests(part, arm, models),
        "generations": arm_vs_dlm._generations(part, arm, models),
        "plans": arm_vs_dlm._plans(part, models),
    }
    for name, rows in again.items():
        kept = [[*row[:-1], row[-1][:1]] for row in record[name]["rows"]]
        for row in rows:
            assert json.loads(json.dumps(row)) in kept, name


def test_findings_in_the_readme_are_those_of_the_committed_record():
    record = json.loads(RECORD.read_text())
    text = (ROOT / "eval/README.md").read_text()
    shown = text.split("<!-- arm_vs_dlm: begin -->")[1].split("<!-- arm_vs_dlm: end -->")[0]
    points = [" ".join(point.split()) for point in shown.split("\n- ")[1:]]
    assert points == arm_vs_dlm_report.findings(record)


def test_a_named_size_needs_no_files():
    with pytest.raises(ValueError, match="no known size"):
        SpeedModel(name="llama9")
