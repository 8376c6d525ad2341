# SPDX-License-Identifier: Apache-2.0
"""Comparing caches on a tiny model: figures, failures in their rows, resuming, the page."""

import json
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from eval import __main__ as program
from eval import kv_leaderboard, kv_leaderboard_measure
from eval.cache_rows import CacheEntry, all_rows
from eval.config import ModelEntry, Perplexity, Problems
from eval.extract import wilson
from eval.kv_leaderboard_config import CacheSpeed, KvLeaderboardConfig, Responses
from eval.kv_leaderboard_plots import Point, frontier
from eval.scoring import Request, Scorer
from sqzjax import config as configs
from sqzjax import kvcache
from sqzjax.decode import SamplingConfig
from sqzjax.errors import ConfigError
from sqzjax.problems import Lookup, stream
from tests import tolerances
from tests.eval.test_run import Checker

ROOT = Path(__file__).resolve().parents[2]
COARSE = {
    "kind": "quantized",
    "key": {"kind": "uniform", "bits": "$bits"},
    "value": {"kind": "uniform", "bits": "$bits"},
}
ASKED = Lookup(length=40, pairs=6, queries=6)
BAD = {"kind": "quantized", "key": {"kind": "uniform", "bits": 5}}
UNSUITED = {"kind": "quantized", "key": {"kind": "uniform", "bits": 4, "group_size": 3}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("A short story about a long cache, told twice. " * 2)
    return path


@pytest.fixture(scope="module")
def settings(tiny_folder, text):
    return KvLeaderboardConfig(
        model=ModelEntry(path=str(tiny_folder)),
        caches=(
            CacheEntry(cache={"kind": "dense"}),
            CacheEntry(cache=COARSE, name="uniform", vary={"bits": [2]}),
        ),
        perplexity=(
            Perplexity(name="text", data=str(text)),
            Responses(name="answers", problems=ASKED, count=4),
        ),
        retrieval=(
            Problems(
                name="lookup",
                problems=Lookup(length=60, pairs=4),
                count=6,
                sampling=SamplingConfig(temperature=0.0, max_new_tokens=1),
            ),
        ),
        speed=CacheSpeed(new_tokens=4, repeats=1),
        context=96,
        prefill_chunk=8,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("leaderboard")
    return kv_leaderboard.run_kv_leaderboard(settings, workdir), workdir


def test_perplexity_is_that_of_the_chunked_cache(finished, tiny, text):
    """Through the dense cache it is the plain forward pass's; through one bit it is not."""
    record, _ = finished
    dense, coarse = record["rows"]
    tokens = list(text.read_bytes())
    assert tiny.tokenizer.encode(text.read_text(), add_bos=None) == tokens
    scorer = Scorer(model=tiny.model, params=tiny.params, max_length=96)
    plain = -scorer.score([Request(tokens[:1], tokens[1:])])[0].logprob / (len(tokens) - 1)
    assert dense["perplexity"]["text"]["perplexity"] == pytest.approx(
        np.exp(plain), rel=tolerances.CHUNKED["float32"]
    )
    level, other = (row["perplexity"]["text"] for row in (dense, coarse))
    assert level["change"] == 0
    assert other["change"] == other["perplexity"] - level["perplexity"] != 0


def test_responses_are_scored_given_their_prompts(finished, tiny):
    total = tokens = 0
    logprobs_of = jax.jit(
        lambda params, fed: jax.nn.log_softmax(tiny.model.forward(params, fed).logits[0])
    )
    for problem in islice(stream(ASKED, split="eval", seed=1), 4):
        fed = np.frombuffer((problem.prompt + problem.response).encode(), np.uint8)[None]
        padded = np.pad(fed, ((0, 0), (0, 96 - fed.size))).astype(np.int32)
        logprobs = np.asarray(logprobs_of(tiny.params, padded))
        size = len(problem.response)
        rows = np.arange(fed.size - 1 - size, fed.size - 1)
        total -= logprobs[rows, fed[0, -size:]].sum()
        tokens += size
    found = finished[0]["rows"][0]["perplexity"]["answers"]
    assert found["tokens"] == tokens == 4 * 11
    assert found["nll"] == pytest.approx(total / tokens, rel=tolerances.CHUNKED["float32"])
    assert found["perplexity"] == pytest.approx(np.exp(found["nll"]), rel=tolerances.FLOAT64_REL)


def test_sizes_are_those_of_allocated_arrays(finished, tiny):
    record, _ = finished
    for row in record["rows"]:
        policy = configs.load(kvcache.CacheConfig, row["settings"])
        caches = tiny.model.init_caches(policy, batch=1, capacity=96, max_new=8)
        assert row["bytes"]["allocated"] == kvcache.nbytes(caches)
    dense, coarse = (row["bytes"] for row in record["rows"])
    assert dense["average_bits"] == pytest.approx(16, rel=tolerances.PLANNED_BYTES)
    assert 2 < coarse["average_bits"] < dense["average_bits"]
    assert coarse["compression"] == 16 / coarse["average_bits"]
    assert coarse["per_token"] == coarse["total"] / 96


def test_rows_have_intervals_and_speeds(finished):
    record, _ = finished
    for row in record["rows"]:
        found = row["retrieval"]["lookup"]
        assert found["questions"] == 6
        assert found["interval_95"] == list(wilson(found["correct"], 6))
        assert row["speed"]["prompt_tokens"] == 92
        assert row["speed"]["prefill_tokens_per_second"] > 0
        assert row["speed"]["decode_tokens_per_second"] > 0


def test_files_tell_the_same(finished):
    record, workdir = finished
    assert json.loads((workdir / "results.json").read_text()) == record
    page = Checker((workdir / "report.html").read_text())
    assert not page.stack and not page.fetched and "svg" in page.tags
    shown = " ".join(page.text)
    table = (workdir / "table.md").read_text()
    for row in record["rows"]:
        bits = f"{row['bytes']['average_bits']:.2f}"
        assert row["name"] in shown and bits in shown
        line = next(line for line in table.splitlines() if line.startswith(f"| {row['name']} |"))
        assert f"| {bits} |" in line
    for name in ("perplexity", "retrieval"):
        assert (workdir / f"{name}.svg").read_text().startswith("<svg xmlns=")


def test_finished_rows_are_kept_and_new_ones_added(finished, settings, monkeypatch):
    record, workdir = finished
    measured = []
    stages = kv_leaderboard_measure.stages

    def counting(config, model, folder):
        measured.append(model.name)
        return stages(config, model, folder)[:1]

    monkeypatch.setattr(kv_leaderboard_measure, "stages", counting)
    more = (CacheEntry(cache={"kind": "kivi", "group_size": 8}), *settings.caches)
    again = kv_leaderboard.run_kv_leaderboard(replace(settings, caches=more), workdir)
    assert measured == ["kivi"]
    kept = [{**row, "perplexity": None} for row in again["rows"][1:]]
    assert kept == [{**row, "perplexity": None} for row in record["rows"]]
    kv_leaderboard.run_kv_leaderboard(replace(settings, prefill_chunk=4), workdir)
    assert measured == ["kivi", "dense", "uniform, bits 2"]


def test_rows_of_other_files_are_measured_anew(settings, text, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_leaderboard_measure, "stages", lambda *given: [])
    monkeypatch.setattr(kv_leaderboard_measure, "with_cache", lambda base, *given: base)
    paths = [tmp_path / name for name in ("text.txt", "kvquant.safetensors")]
    for path in paths:
        path.write_bytes(text.read_bytes())
    config = replace(
        settings,
        caches=(CacheEntry(cache={"kind": "kvquant", "calibration": str(paths[1])}),),
        perplexity=(Perplexity(name="text", data=str(paths[0])),),
    )

    def keys():
        record = kv_leaderboard.run_kv_leaderboard(config, tmp_path / "run")
        return [row["key"] for row in record["rows"]]

    found = [keys(), keys()]
    for path in paths:
        path.write_text("made anew")
        found.append(keys())
    assert found[0] == found[1] != found[2] != found[3] and found[1] != found[3]


def test_a_cache_that_fails_says_so_and_stops_nothing(settings, tmp_path, monkeypatch):
    stages = kv_leaderboard_measure.stages
    monkeypatch.setattr(kv_leaderboard_measure, "stages", lambda *given: stages(*given)[:1])
    caches = (
        CacheEntry(cache=BAD, name="bad"),
        CacheEntry(cache=UNSUITED, name="unsuited"),
        CacheEntry(cache={"kind": "dense"}),
    )
    config = replace(settings, caches=caches)
    record = kv_leaderboard.run_kv_leaderboard(config, tmp_path)
    bad, unsuited, _ = record["rows"]
    assert [row["status"] for row in record["rows"]] == ["failed", "failed", "ok"]
    assert bad["error"].startswith("settings: ConfigError") and "bits=5" in bad["error"]
    assert unsuited["error"].startswith("bytes: ValueError") and "group_size=3" in unsuited["error"]
    assert "bits=5" in (tmp_path / "report.html").read_text()
    assert [line.split(":")[0] for line in kv_leaderboard.problems(config)] == ["bad"]

    tried = []
    monkeypatch.setattr(
        kv_leaderboard_measure, "stages", lambda *given: tried.append(given[1].name) or []
    )
    kv_leaderboard.run_kv_leaderboard(config, tmp_path)
    assert tried == ["unsuited"], "failed rows are tried again, finished ones are not"


def test_a_damaged_record_is_measured_anew(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_leaderboard_measure, "stages", lambda *given: [])
    (tmp_path / "results.json").write_text('{"rows": [{"na')
    record = kv_leaderboard.run_kv_leaderboard(settings, tmp_path)
    assert [row["status"] for row in record["rows"]] == ["ok"] * 2


def test_missing_files_are_reported_before_anything_is_loaded(settings, tmp_path):
    task = Perplexity(name="text", data=str(tmp_path / "none.txt"))
    config = replace(settings, perplexity=(task,), model=ModelEntry(path=str(tmp_path / "no")))
    with pytest.raises(ConfigError) as caught:
        kv_leaderboard.run_kv_leaderboard(config, tmp_path)
    assert len(caught.value.problems) == 2


def test_no_room_for_prompts_is_reported_before_anything_is_measured(settings, tmp_path):
    config = replace(settings, speed=CacheSpeed(new_tokens=96))
    with pytest.raises(ConfigError, match=r"new_tokens=96 leaves no room .* context of 96"):
        kv_leaderboard.run_kv_leaderboard(config, tmp_path)
    assert any("new_tokens=96" in line for line in kv_leaderboard.problems(config))


@pytest.mark.slow
def test_chunks_of_one_feed_every_token_by_itself(tiny, text):
    """Each step of the scorer is then what decoding does: one token against the cache."""
    tokens = list(text.read_bytes())[:16]
    policy = kvcache.Quantized()
    scorer = Scorer(
        model=tiny.model, params=tiny.params, cache=policy, max_length=16, prefill_chunk=1
    )
    score = scorer.score([Request(tokens[:1], tokens[1:])])[0]
    caches = tiny.model.init_caches(policy, batch=1, capacity=16, max_new=1)
    step = jax.jit(tiny.model.forward)
    total = 0.0
    for index, token in enumerate(tokens[:-1]):
        out = step(
            tiny.params,
            np.array([[token]]),
            positions=np.array([[index]]),
            caches=caches,
        )
        caches = out.caches
        total += float(jax.nn.log_softmax(out.logits[0, 0])[tokens[index + 1]])
    assert score.logprob == pytest.approx(total, rel=tolerances.CHUNKED["float32"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caches": ()}, "at least one cache"),
        ({"caches": (CacheEntry(cache={"kind": "dense"}),) * 2}, "dense"),
        ({"baseline": "kivi"}, "baseline='kivi'"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"perplexity": (), "retrieval": ()}, "give at least one"),
        ({"model": ModelEntry(path="x", cache={"kind": "dense"})}, "model.cache"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        replace(settings, **change)


def test_entries_become_rows():
    entry = CacheEntry(cache=COARSE | {"sinks": "$first"}, vary={"bits": [2, 4], "first": [0, 1]})
    rows = all_rows([entry, CacheEntry(cache={"kind": "dense"})])
    assert [row.name for row in rows][1:] == [
        "quantized, bits 2, first 1",
        "quantized, bits 4, first 0",
        "quantized, bits 4, first 1",
        "dense",
    ]
    assert rows[2].settings["sinks"] == 0
    assert [rows[2].settings[part]["bits"] for part in ("key", "value")] == [4, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cache": COARSE}, "$name"),
        ({"cache": {"kind": "dense"}, "vary": {"bits": [2]}}, "$name"),
        ({"cache": COARSE, "vary": {"bits": 2}}, "vary.bits=2"),
        ({"cache": {"bits": 2}}, "needs a kind"),
    ],
)
def test_bad_entries_say_what_is_wrong(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        CacheEntry(**fields)


def test_the_frontier_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [
        Point(str(i), "m", float(c), float(q), (q, q))
        for i, (c, q) in enumerate(rng.random((40, 2)))
    ]
    for higher in (False, True):
        sign = -1 if higher else 1
        kept = frontier(points, higher_is_better=higher)
        beaten = [
            any(
                other is not one
                and other.cost <= one.cost
                and sign * other.quality <= sign * one.quality
                for other in points
            )
            for one in points
        ]
        assert {p.name for p in kept} == {p.name for p, lost in zip(points, beaten) if not lost}


def test_the_committed_configuration_names_every_kind_of_cache():
    config = program.PROGRAM.commands["kv_leaderboard"]
    assert config.schema.endswith(":KvLeaderboardConfig")
    loaded = configs.load(KvLeaderboardConfig, ROOT / "configs/eval/kv_leaderboard.yaml")
    lines = kv_leaderboard.problems(loaded)  # its model and calibration are made first
    assert all(line.startswith("not found yet: ") for line in lines), lines
    kinds = {policy.kind for policy in map(kv_leaderboard.policy_of, loaded.rows)}
    known = {kind.__dataclass_fields__["kind"].default for kind in kvcache.CacheConfig.__args__}
    assert kinds == known - {"losa"}, "LoSA is for diffusion models; all others belong here"
