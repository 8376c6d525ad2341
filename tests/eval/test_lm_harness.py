# SPDX-License-Identifier: Apache-2.0
"""The lm-eval adapter: its functions without lm-eval, and a local task where it is installed."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from eval import lm_harness
from eval.config import LmEval
from sqzjax.errors import ConfigError, RequestError
from sqzjax.io import tokenizer as tokenizers
from tests import tolerances

BYTES = tokenizers.load("bytes")


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.forward(params, tokens).logits


def brute_force(model, ids, begin) -> tuple[float, bool]:
    """Sum the log-probabilities of ids[begin:] from one forward pass over everything."""
    padded = np.zeros((1, 128), np.int32)  # what follows cannot matter to a causal model
    padded[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(forward(model.model, model.params, padded), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(begin - 1, len(ids) - 1)
    greedy = (logits[rows].argmax(-1) == np.asarray(ids)[begin:]).all()
    return float(logprobs[rows, np.asarray(ids)[begin:]].sum()), bool(greedy)


def test_pairs_split_where_lm_eval_splits_them():
    request = lm_harness.encode_pair(BYTES, "The sky is ", "blue")
    assert BYTES.decode(request.context) == "The sky is"
    assert BYTES.decode(request.target) == " blue"
    for empty in ("", "  "):
        request = lm_harness.encode_pair(BYTES, empty, "blue")
        assert request.context == [BYTES.bos_id]
        assert BYTES.decode(request.target) == empty + "blue"


def test_joint_encoding_does_not_tear_words(shared_data):
    tokenizer = tokenizers.load(shared_data / "stories260K")
    request = lm_harness.encode_pair(tokenizer, "Once upon a", " time there")
    whole = tokenizer.encode("Once upon a time there", add_bos=None)
    assert [*request.context, *request.target] == whole
    assert whole[0] == tokenizer.bos_id


def test_loglikelihood_equals_brute_force_in_request_order(tiny):
    pairs = [("Long context here, ", "yes"), ("", "no"), ("a", "b" * 30), ("x ", "y")]
    found = lm_harness.loglikelihood(tiny, pairs)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        request = lm_harness.encode_pair(BYTES, context, continuation)
        ids = [*request.context, *request.target]
        expected = brute_force(tiny, ids, len(request.context))
        assert logprob == pytest.approx(expected[0], abs=tolerances.SUMMED_LOGPROB)
        assert greedy == expected[1]


def test_long_contexts_lose_their_beginning(tiny):
    text = "".join(chr(97 + i % 26) for i in range(300))
    ((logprob, _),) = lm_harness.loglikelihood(tiny, [(text, "!!")])
    ids = BYTES.encode(text + "!!")[-129:]
    assert logprob == pytest.approx(brute_force(tiny, ids, 127)[0], abs=tolerances.SUMMED_LOGPROB)


def test_rolling_scores_every_token_once_with_full_context(tiny):
    texts = ["", "short", "z" * 128, "".join(chr(97 + i % 26) for i in range(300))]
    found = lm_harness.loglikelihood_rolling(tiny, texts)
    assert found[0] == 0.0
    for text, total in zip(texts[1:], found[1:], strict=True):
        ids = [BYTES.bos_id, *BYTES.encode(text)]
        expected, begin = 0.0, 1
        while begin < len(ids):  # The protocol in the documentation of lm-eval's LM class.
            end = min(begin + 128, len(ids))
            window = ids[max(0, end - 129) : end]
            expected += brute_force(tiny, window, len(window) - (end - begin))[0]
            begin = end
        assert total == pytest.approx(expected, abs=tolerances.ROLLING_LOGPROB)


def test_generation_in_request_order_with_mixed_settings(tiny):
    asked = [
        ("abc", {"until": ["\n"], "max_gen_toks": 3}),
        ("a much longer prompt than that", {"until": "q", "max_gen_toks": 5, "do_sample": False}),
        ("", {"max_gen_toks": 2, "temperature": 0.0}),
        ("x" * 500, {"max_gen_toks": 4}),
        ("tail", {"max_gen_toks": 1}),
    ]
    together = lm_harness.generate_until(tiny, asked)
    assert together == [lm_harness.generate_until(tiny, [one])[0] for one in asked]


def test_sampling_keywords():
    plain = lm_harness.sampling({"until": ["a", "", "a"], "do_sample": False, "temperature": 0.7})
    assert plain.stop_strings == ("a",) and plain.effective_temperature == 0
    assert plain.max_new_tokens == lm_harness.DEFAULT_NEW_TOKENS
    assert lm_harness.sampling({"temperature": 0.7}).effective_temperature == 0.7
    assert lm_harness.sampling({"do_sample": True}).effective_temperature == 1.0
    assert lm_harness.sampling({}).effective_temperature == 0
    with pytest.raises(RequestError, match=r"\['num_beams'\] are not supported"):
        lm_harness.sampling({"num_beams": 4})


def test_no_room_for_a_prompt_is_an_error(tiny):
    with pytest.raises(RequestError, match="max_gen_toks=128 leaves no room"):
        lm_harness.generate_until(tiny, [("a", {"max_gen_toks": 128})])


def test_keywords_build_a_model(tiny_folder):
    model = lm_harness.from_keywords(
        str(tiny_folder),
        cache="dense",
        dtype="float32",
        batch_size="2",
        max_length=64,
        device="cpu",
    )
    assert (model.batch_size, model.limit) == (2, 64)
    assert model.cache is not None and model.describe()["cache"]["kind"] == "dense"
    with pytest.raises(ConfigError, match=r"unknown model_args \['bits'\]"):
        lm_harness.from_keywords(str(tiny_folder), bits=3)
    with pytest.raises(ConfigError, match="bits"):
        lm_harness.from_keywords(str(tiny_folder), cache="dense", bits=3)
    with pytest.raises(ConfigError, match="batch_size='auto' must be a number"):
        lm_harness.from_keywords(str(tiny_folder), batch_size="auto")


def test_a_tokenizer_without_special_tokens_cannot_begin_a_text():
    class Bare:
        bos_id = eos_id = None

    with pytest.raises(RequestError, match="neither BOS nor EOS"):
        lm_harness.prefix_token(Bare())


def test_without_lm_eval_the_error_says_what_to_install():
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="install the extra 'eval'"):
            lm_harness.register()


def test_metric_names_and_errors():
    values = {
        "alias": "x",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "exact_match,strict-match": np.float64(0.25),
        "exact_match_stderr,strict-match": 0.1,
    }
    assert lm_harness._plain(values) == {
        "acc": {"value": 0.5, "stderr": None},
        "exact_match (strict-match)": {"value": 0.25, "stderr": 0.1},
    }


CHOICE = """
task: sqzjax_choice
dataset_path: json
dataset_kwargs: {data_files: {test: "%(data)s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: sqzjax_write
dataset_path: json
dataset_kwargs: {data_files: {test: "%(data)s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLL = """
task: sqzjax_roll
dataset_path: json
dataset_kwargs: {data_files: {test: "%(data)s"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_runs_a_local_task(tiny, tmp_path, monkeypatch):
    """lm-eval's own figures equal those computed from our functions."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra 'eval')")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [
        {"question": f"Item {i} is", "choices": ["red", "green", "blue"], "answer": i % 3}
        for i in range(7)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("roll", ROLL)):
        (tmp_path / f"{name}.yaml").write_text(text % {"data": data})
    task = LmEval(
        tasks=("sqzjax_choice", "sqzjax_write", "sqzjax_roll"), include_path=str(tmp_path)
    )
    metrics = lm_harness.run(task, tiny, seed=0)["metrics"]
    right = 0
    for doc in docs:
        pairs = [(doc["question"], f" {choice}") for choice in doc["choices"]]
        scores = [logprob for logprob, _ in lm_harness.loglikelihood(tiny, pairs)]
        right += int(np.argmax(scores)) == doc["answer"]
    assert metrics["sqzjax_choice"]["acc"]["value"] == pytest.approx(right / 7)
    assert metrics["sqzjax_write"]["exact_match"]["value"] == 0.0
    total = sum(lm_harness.loglikelihood_rolling(tiny, [doc["question"] for doc in docs]))
    size = sum(len(doc["question"].encode()) for doc in docs)
    expected = float(np.exp(-total / size))
    assert metrics["sqzjax_roll"]["byte_perplexity"]["value"] == pytest.approx(
        expected, rel=tolerances.RAGGED
    )
