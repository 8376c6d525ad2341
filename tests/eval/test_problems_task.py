# SPDX-License-Identifier: Apache-2.0
"""Problems as an evaluation: held-out prompts, exact answers, what decoding cost, the trade-off."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import plots, report, run, tasks
from eval.config import EvalConfig, ModelEntry, Problems
from eval.models import load
from eval.usage import Usage, total
from sqzjax import config as configs
from sqzjax import problems
from sqzjax.decode import GenerateOutput, GenerateStats, SamplingConfig
from sqzjax.io import hf
from sqzjax.io import tokenizer as tokenizers
from sqzjax.models import DecoderLM, Execution, ModelConfig, SpecialTokens
from sqzjax.problems import Addition, Sorting
from tests.parameters import drawn

BYTES = tokenizers.load("bytes")
BLOCK = 4
BLOCKWISE = ModelConfig(
    family="sdar",
    qk_norm=True,
    vocab_size=260,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    max_positions=128,
    mask="block_causal",
    block_size=BLOCK,
    tokens=SpecialTokens(bos=256, eos=(257,), pad=258, mask=259),
)


class Solver:
    """Adds well, unless the first number is odd; a token costs half a pass and 10 ms."""

    tokenizer = BYTES
    fingerprint = "solver"

    def __init__(self):
        self.asked, self.calls = [], 0

    def generate(self, prompts, sampling, *, row_ids, truncate="never", usage=None):
        self.asked += [BYTES.decode(prompt) for prompt in prompts]
        self.calls += 1
        texts = []
        for prompt in prompts:
            left, right = map(int, BYTES.decode(prompt).removesuffix("=").split("+"))
            texts.append(f"so:{left + right + left % 2}")
        if usage is not None:
            usage.add(output_of([len(text) for text in texts]), 0.01 * sum(map(len, texts)))
        return texts


def output_of(lengths, **extra) -> GenerateOutput:
    extra = extra or {"forwards": max(lengths) // 2, "row_forwards": sum(lengths) / 2}
    numbers = {"prefill_seconds": 0.0, "ttft_seconds": 0.0, "decode_seconds": 0.0}
    stats = GenerateStats(
        prompt_tokens=1,
        new_tokens=sum(lengths),
        rows=len(lengths),
        steps=max(lengths) - 1,
        cache_bytes=0,
        extra=extra,
        **numbers,
    )
    return GenerateOutput(
        tokens=np.zeros((len(lengths), max(lengths)), np.int32),
        lengths=np.array(lengths),
        finish_reason=("length",) * len(lengths),
        text=None,
        logprobs=None,
        stats=stats,
    )


def answer(task, model, folder, **options):
    settings = {"batch_size": 4, "seed": 0, "samples_file": folder / "samples.jsonl"}
    return tasks.run(task, model, **settings | options)


TASK = Problems(problems=Addition(digits=2), count=30, warm_up=False)


def test_accuracy_over_prompts_that_training_never_sees(tmp_path):
    model = Solver()
    result = answer(TASK, model, tmp_path)
    even = sum(int(prompt.split("+")[0]) % 2 == 0 for prompt in model.asked)
    assert 0 < even < 30
    assert (result["correct"], result["questions"]) == (even, 30)
    assert result["interval_95"][0] < even / 30 < result["interval_95"][1]
    assert len(set(model.asked)) == 30 and all(map(problems.is_held_out, model.asked))
    trained = problems.stream(TASK.problems, split="train", seed=1)
    assert not {next(trained).prompt for _ in range(500)} & set(model.asked)


def test_costs_add_up_also_over_an_interruption(tmp_path):
    whole = answer(TASK, Solver(), tmp_path)
    assert whole["usage"]["mean_tokens"] == whole["usage"]["tokens"] / 30
    assert whole["usage"]["tokens_per_forward"] == pytest.approx(2.0)
    assert whole["usage"]["tokens_per_second"] == pytest.approx(100.0)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text("\n".join(lines[:8]))
    again = Solver()
    assert answer(TASK, again, tmp_path) == whole
    assert len(again.asked) == 22


def test_warming_up_repeats_the_first_batch_and_leaves_no_trace(tmp_path):
    model = Solver()
    warm = configs.load(Problems, configs.to_dict(TASK) | {"warm_up": True})
    result = answer(warm, model, tmp_path)
    assert model.asked[:4] == model.asked[4:8] and len(model.asked) == 34
    (tmp_path / "other").mkdir()
    assert result == answer(TASK, Solver(), tmp_path / "other")


def test_other_problems_do_not_reuse_samples(tmp_path):
    answer(TASK, Solver(), tmp_path)
    other = Solver()
    answer(Problems(problems=Addition(digits=2), count=30, seed=9), other, tmp_path)
    assert len(set(other.asked)) == 30


def test_a_decoder_that_counts_nothing_makes_a_pass_a_token():
    usage = Usage()
    usage.add(output_of([3, 5], cache=1), 2.0)
    usage.add(output_of([4], forwards=2), 1.0)
    shares = [row["forwards"] for row in usage.rows]
    assert shares == [2.5, 2.5, 2]
    assert total(usage.rows) == {
        "tokens": 12,
        "mean_tokens": 4.0,
        "forwards": 7,
        "tokens_per_forward": 1.2,
        "seconds": 3.0,
        "tokens_per_second": 4.0,
        "counts": {},
    }
    assert total([*usage.rows, None]) is None and total([]) is None


def test_what_else_a_decoder_counts_is_added_up():
    usage = Usage()
    usage.add(output_of([3, 5], forwards=2, pages_read=3, pages_held=8, cache_bytes=100), 1.0)
    usage.add(output_of([4], forwards=2, pages_read=1, pages_held=8, cache_bytes=80), 1.0)
    found = total(usage.rows)
    assert found["counts"] == {"pages_held": 16, "pages_read": 4} and found["density"] == 0.25
    assert found["cache_bytes_per_row"] == 60.0


# Real models


@pytest.fixture(scope="module")
def blockwise_folder(tmp_path_factory):
    folder, files = (tmp_path_factory.mktemp(name) for name in ("blockwise", "tokenizer"))
    BYTES.save(files)
    params = drawn(DecoderLM(BLOCKWISE, Execution()), 1)
    hf.save(folder / "model", BLOCKWISE, params, tokenizer_files=sorted(files.iterdir()))
    return str(folder / "model")


def test_a_causal_model_makes_one_pass_a_token(tiny):
    usage, sampling = Usage(), SamplingConfig(max_new_tokens=6, temperature=0, ignore_eos=True)
    tiny.generate([[1, 2], [3], [4, 5, 6], [7], [8, 9]], sampling, row_ids=range(5), usage=usage)
    assert [row["tokens"] for row in usage.rows] == [6] * 5
    found = total(usage.rows)
    assert found is not None
    assert (found["tokens"], found["forwards"], found["tokens_per_forward"]) == (30, 12, 1.0)
    assert found["tokens_per_second"] == pytest.approx(30 / found["seconds"])


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_diffusion_decoder_reports_its_passes(blockwise_folder, steps):
    """The last batch has a single row: what fills it up does not count."""
    decoder = {"kind": "diffusion", "commit": {"kind": "top_count", "steps": steps}}
    model = load(ModelEntry(path=blockwise_folder, decoder=decoder), batch_size=2)
    usage, sampling = Usage(), SamplingConfig(max_new_tokens=8, temperature=0, ignore_eos=True)
    # The prompts end with a block, so that all others are generated whole.
    model.generate([[1, 2, 3, 4]] * 2 + [[5] * 8], sampling, row_ids=range(3), usage=usage)
    found = total(usage.rows)
    assert found is not None
    assert found["tokens_per_forward"] == pytest.approx(BLOCK / steps)
    assert found["forwards"] == 2 * (2 * steps)


def test_the_report_shows_costs_and_the_trade_off(tiny_folder, blockwise_folder, tmp_path):
    decoder = {"kind": "diffusion", "commit": {"kind": "top_count", "steps": 1}}
    models = [
        {"name": "causal", "path": str(tiny_folder)},
        {"name": "blocks", "path": blockwise_folder, "decoder": decoder},
    ]
    task = {
        "kind": "problems",
        "problems": {"kind": "sorting", "length": 3},
        "count": 5,
        "sampling": {"max_new_tokens": 4, "temperature": 0},
    }
    config = configs.load(EvalConfig, {"models": models, "tasks": [task], "batch_size": 4})
    assert config.tasks == (
        Problems(
            problems=Sorting(length=3),
            count=5,
            sampling=SamplingConfig(max_new_tokens=4, temperature=0),
        ),
    )
    assert run.run(config, workdir=tmp_path) == run.OK
    document = json.loads((tmp_path / "results.json").read_text())
    causal, blocks = (result["metrics"] for result in document["results"])
    assert causal["questions"] == blocks["questions"] == 5
    assert causal["usage"]["tokens_per_forward"] == 1 < blocks["usage"]["tokens_per_forward"]
    page = (tmp_path / "report.html").read_text()
    for words in ("Task: sorting", "tokens/forward", "Made-up problems", "length 3"):
        assert words in page
    assert page.count("<figure>") == 1
    document["results"] = document["results"][:1]
    assert "<figure>" not in report.render(document), "one model has nothing to compare with"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_frontier_is_what_nothing_beats(points):
    expected = [
        point
        for point in sorted(set(points))
        if not any(o != point and o[0] >= point[0] and o[1] >= point[1] for o in points)
    ]
    assert plots.frontier(points) == expected
