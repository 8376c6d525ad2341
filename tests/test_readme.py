# SPDX-License-Identifier: Apache-2.0
"""Figures in the README come from committed measurements."""

import itertools
import json
from pathlib import Path

import pytest

from eval import forecast_report, tables, tradeoff
from eval.kv_leaderboard_report import markdown
from eval.scaling_tables import tables as scaling_tables
from eval.speed import comparison, emulators

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
    for row in record["decode"]:
        if row["model"] == "llama_25m":
            assert f"{row['roofline_percent']:.0f} %" in shown


def test_what_another_processor_gave_is_in_its_record():
    here, there = (
        json.loads((ROOT / f"eval/results/{name}.json").read_text())["transformers"]
        for name in ("speed_cpu", "speed_cpu_xeon")
    )
    shown = " ".join((ROOT / "README.md").read_text().split())
    rate = "transformers_tokens_per_second"
    faster = max(y[rate] / x[rate] for x, y in zip(here, there, strict=True))
    assert f"PyTorch decodes up to {faster:.1f} times as fast" in shown
    ratios = {(row["model"], row["batch"], row["cache"]): row["speedup"] for row in there}
    assert f"{ratios['stories260k', 8, 'dynamic']:.2f} times as fast as transformers" in shown
    assert f"{ratios['llama_25m', 1, 'dynamic']:.2f} times at batch 1 and" in shown
    assert f"and {ratios['llama_25m', 8, 'dynamic']:.2f} times at batch 8" in shown


def test_the_table_of_packed_caches_is_that_of_the_committed_record():
    record = json.loads((ROOT / "pallas_kernels/results/quantized_cpu.json").read_text())
    shown = (ROOT / "pallas_kernels/README.md").read_text()
    assert f"{record['processor']}, " in shown
    slower = record["rows"]["torch_sdpa"]["ratio_to_float32"]
    assert f"which takes {slower:.1f} times as long as the former" in shown
    for name, row in record["rows"].items():
        if "cache_bytes" in row and name != "float32":
            size = record["rows"]["float32"]["cache_bytes"] / row["cache_bytes"]
            times = f"{row['ratio_to_float32']:.2f} | {row['ratio_to_torch_sdpa']:.2f}"
            assert f"| {name} | {size:.1f} | {times} |" in shown


def test_the_table_of_compiled_kernels_is_that_of_the_committed_record():
    record = json.loads((ROOT / "pallas_kernels/results/compiled_h200.json").read_text())
    kernels = {row["name"]: row for row in record}
    lines = (ROOT / "pallas_kernels/README.md").read_text().split("| kernel, H200 (compiled)")[1]
    shown = itertools.takewhile(lambda line: "|" in line, lines.splitlines()[2:])
    rows = [line.strip("| ").split(" | ") for line in shown]
    assert len(rows) > 10
    for name, *shown in rows:
        row = kernels[name]
        memory = f"{row['shared_memory']:,} B"
        expected = [row["registers"], row["spill_bytes"], memory, row["blocks_per_sm"]]
        assert shown == [str(value) for value in [*expected, row["loop_instructions"]]]


# row: compiled kernels, and bytes that 64 tokens of a head take there, times the tiles of a step
ISSUED = {
    "int8, int4": {"int8": 2 * 264, "int4": 2 * 136},
    "int4 in groups of 32": {"int4_groups": 160},
    "int3": {"int3": 2 * 104},
    "int2": {"int2": 2 * 72},
    "NormalFloat, 4 bits in groups of 32": {"normal_float4": 160},
    "KIVI 4 bits, groups of 32": {"kivi4": 160},
    "KIVI 2 bits, groups of 128 / of 32": {"kivi2_g128": 2 * 72, "kivi2": 96},
    "KVQuant 4 / 3 / 2 bits, one exact entry": {"kvquant4": 138, "kvquant3": 106, "kvquant2": 74},
}
BANDWIDTH = (3.35e12, 4.8e12)


@pytest.mark.parametrize("name", ISSUED)
def test_shares_of_the_bandwidth_follow_from_the_instructions(name):
    record = json.loads((ROOT / "pallas_kernels/results/compiled_h200.json").read_text())
    kernels = {row["name"]: row for row in record}
    text = (ROOT / "pallas_kernels/README.md").read_text()
    table = text.split("| cache | H100 | H200 |")[1].split("\n\n")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    for bandwidth, shown in zip(BANDWIDTH, line.split("|")[2:]):
        shares = []
        for kernel, per_token in ISSUED[name].items():
            row = kernels[f"quantized_{kernel}"]
            # Four warps on four schedulers; three of them skip what one alone loads.
            cycles = (3 * row["least_instructions"] + row["loop_instructions"]) / 4
            bytes_per_cycle = bandwidth / 132 / 1.98e9
            shares.append(min(1.0, 64 * per_token / cycles / bytes_per_cycle))
        assert shown.strip() == " / ".join(f"{100 * x:.0f}" for x in dict.fromkeys(shares)) + " %"


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("cdlm", "cdlm_tiny"),
        ("sudoku", "cdlm_sudoku"),
        ("rcd", "rcd_tiny"),
        ("losa", "losa_tiny"),
    ],
)
def test_tables_of_diffusion_models_are_those_of_the_committed_records(name, record):
    file = ROOT / f"eval/results/{record}.json"
    text = (ROOT / "README.md").read_text()
    shown = text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
    assert shown.strip() == tradeoff.table(json.loads(file.read_text()))
    assert file.with_suffix(".svg").read_text().startswith("<svg")


def test_what_is_said_of_every_seed_is_so():
    """Differences in points between methods that share their seeds, from the committed records."""

    def gains(record, method, other, setting):
        rows = json.loads((ROOT / f"eval/results/{record}.json").read_text())["rows"]
        levels = {row["model"]: row["by_seed"] for row in rows}
        pairs = zip(levels[f"{method}, {setting}"], levels[f"{other}, {setting}"], strict=True)
        return [100 * (one - two) for one, two in pairs]

    text = " ".join((ROOT / "README.md").read_text().split())
    names = ("cdlm_sudoku", "all losses", "distillation only")
    both = gains(*names, "one a step") + gains(*names, "0.9")
    assert f"by {min(both):.1f} to {max(both):.1f} points (at 0.7 in two of three)" in text
    assert sum(gain > 0 for gain in gains(*names, "0.7")) == 2
    settings = ("3 steps", "4 steps", "2 steps", "0.7", "0.9", "0.97", "0.99")
    rcd = {setting: gains("rcd_tiny", "rcd", "seqd", setting) for setting in settings}
    assert min(rcd["2 steps"]) > 0
    assert abs(sum(gains("rcd_tiny", "rcd", "seqd", "one a step"))) < 0.5
    said = "by {} points on average at 4.0 tokens a pass, {} at 3.2 and {} at 5.3, there in every "
    said += "seed; by {}, {}, {} and {} at thresholds of 0.7, 0.9, 0.97 and 0.99."
    assert said.format(*(f"{sum(seeds) / 3:.1f}" for seeds in rcd.values())) in text
    rows = json.loads((ROOT / "eval/results/rcd_tiny.json").read_text())["rows"]
    best, same = (
        max(
            (row for row in rows if row["model"].startswith(f"{method},")),
            key=lambda row: row["accuracy"],
        )
        for method in ("seqd", "rcd")
    )
    said = f"at SeqD's best, {100 * best['accuracy']:.1f} % in {best['passes']:.1f} passes: RCD's "
    assert said + f"{100 * same['accuracy']:.1f} % take {same['passes']:.1f}." in text


def test_what_is_said_of_sparse_attention_is_so():
    rows = json.loads((ROOT / "eval/results/losa_tiny.json").read_text())["rows"]
    rows = {row["model"]: row for row in rows}
    dense, quest, losa = (rows[n] for n in ("dense", "quest, 56", "losa, 128 and 3 active"))
    lost = [100 * (dense["accuracy"] - row["accuracy"]) for row in (losa, quest)]
    (read,) = {f"{100 * row['density']:.0f}" for row in (losa, quest)}
    said = f"At {read} % of the context read LoSA loses {lost[0]:.1f} points of "
    said += f"{100 * dense['accuracy']:.1f} %, Quest {lost[1]:.0f}:"
    assert said in " ".join((ROOT / "README.md").read_text().split())


def test_the_table_of_caches_is_that_of_the_committed_record():
    record = json.loads((ROOT / "eval/results/kv_stories260k.json").read_text())
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- kv: begin -->")[1].split("<!-- kv: end -->")[0]
    assert shown.strip() == markdown(record).split("\n\n")[0]


def test_the_rows_of_the_lookup_are_those_of_the_committed_record():
    record = json.loads((ROOT / "eval/results/kv_needle.json").read_text())
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- needle: begin -->")[1].split("<!-- needle: end -->")[0].strip()
    measured = [line.split(" |")[:7] for line in markdown(record).splitlines()]
    lines = [line.removesuffix(" |").split(" |") for line in shown.splitlines()]
    assert len(lines) > 10 and all(line in measured for line in lines)
    assert all(row["status"] == "ok" for row in record["rows"])
    assert f"all {len(record['rows'])} rows" in text and "dirty" not in record["commit"]


def test_the_tables_of_emulators_are_those_of_the_committed_records():
    text = (ROOT / "README.md").read_text()
    record = json.loads((ROOT / "eval/results/weather_scaling.json").read_text())
    columns, rows = scaling_tables(record)["optima"]
    flat = [dict(zip(columns, row)) for row in rows]
    optima = "\n".join(tables.table(flat, [(name, name, "{}") for name in columns]))
    shown = text.split("<!-- scaling: begin -->")[1].split("<!-- scaling: end -->")[0]
    assert shown.strip() == optima
    record = json.loads((ROOT / "eval/results/weather_forecast.json").read_text())
    shown = text.split("<!-- forecast: begin -->")[1].split("<!-- forecast: end -->")[0]
    assert shown.strip() == forecast_report.markdown(record).split("\n\n")[0]


def test_the_table_of_emulator_steps_is_that_of_the_committed_record():
    record = json.loads((ROOT / "eval/results/emulator_speed_cpu.json").read_text())
    text = (ROOT / "README.md").read_text()
    shown = text.split("<!-- emulator speed: begin -->")[1]
    assert shown.split("<!-- emulator speed: end -->")[0].strip() == emulators(record)
    assert record["load_average"] < 1 and "dirty" not in record["commit"]


def test_the_laws_of_published_runs_are_those_of_the_committed_record():
    record = json.loads((ROOT / "eval/results/scaling_published.json").read_text())
    law = record["laws"][0]
    text = (ROOT / "README.md").read_text()
    size, loss = law["size"], law["loss"]
    told = f"N = {size['coefficient']:.2e} C^{size['exponent']:.3f}".replace("e-04", "e-4")
    assert told in text
    assert f"L = {loss['coefficient']:.1f} C^{loss['exponent']:.3f}" in text
