# SPDX-License-Identifier: Apache-2.0
"""Token log-likelihoods against one unbatched forward pass per request in float64."""

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import scoring
from eval.scoring import Request, Scorer
from sqzjax import kvcache
from sqzjax.errors import RequestError
from sqzjax.models import DecoderLM, Execution, ModelConfig
from tests import tolerances
from tests.parameters import drawn

CONFIG = ModelConfig(
    vocab_size=61,
    embedding_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    max_positions=64,
)


@pytest.fixture(scope="module")
def model():
    return DecoderLM(CONFIG, Execution(scan_layers=False))


@pytest.fixture(scope="module")
def params(model):
    return drawn(model)


def requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        context = rng.integers(0, 61, rng.integers(1, 40)).tolist()
        made.append(Request(context, rng.integers(0, 61, rng.integers(1, 24)).tolist()))
    return made


@partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    return model.forward(params, ids).logits


def all_logits(model, params, ids) -> np.ndarray:
    """Logits of every row of one sequence; what follows it cannot matter to a causal model."""
    padded = np.zeros((1, CONFIG.max_positions), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(model, params, padded), np.float64)[0, : len(ids)]


def reference(model, params, request: Request) -> tuple[np.ndarray, bool]:
    """Feed everything, take a float64 log-softmax of every row, look the targets up."""
    ids = np.array([*request.context, *request.target])
    logits = all_logits(model, params, ids)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(request.context) - 1, len(ids) - 1)
    return logprobs[rows, ids[rows + 1]], bool((logits[rows].argmax(-1) == ids[rows + 1]).all())


def test_scores_equal_separate_forward_passes_in_request_order(model, params):
    asked = requests(13)
    scores = Scorer(model=model, params=params, batch_size=4).score(asked)
    for request, score in zip(asked, scores, strict=True):
        expected, greedy = reference(model, params, request)
        np.testing.assert_allclose(score.token_logprobs, expected, atol=tolerances.RAGGED)
        assert score.logprob == pytest.approx(expected.sum(), abs=tolerances.SUMMED_LOGPROB)
        assert score.is_greedy == greedy


def test_greedy_continuation_is_reported_as_greedy(model, params):
    ids = [5, 9, 2]
    for _ in range(6):
        ids.append(int(all_logits(model, params, ids)[-1].argmax()))
    greedy, other = ids[3:], [*ids[3:-1], (ids[-1] + 1) % 61]
    scores = Scorer(model=model, params=params).score(
        [Request(ids[:3], greedy), Request(ids[:3], other)]
    )
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize(("chunk", "scan"), [(1, False), (7, False), (7, True), (500, False)])
def test_dense_cache_scores_like_the_plain_forward(params, chunk, scan):
    from sqzjax.models import stack_layers

    weights = stack_layers(params) if scan else params
    model = DecoderLM(CONFIG, Execution(scan_layers=scan))
    asked = requests(5, seed=1)
    plain = Scorer(model=model, params=weights, batch_size=4).score(asked)
    cache = kvcache.Dense()
    cached = Scorer(
        model=model, params=weights, cache=cache, prefill_chunk=chunk, batch_size=4
    ).score(asked)
    for one, other in zip(plain, cached, strict=True):
        np.testing.assert_allclose(
            one.token_logprobs, other.token_logprobs, atol=tolerances.CHUNKED["float32"]
        )


@pytest.fixture(scope="module")
def alone(model, params):
    scorer = Scorer(model=model, params=params, batch_size=1)
    return [scorer.score([request])[0] for request in requests(9, seed=2)]


@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(9)))
def test_batch_composition_does_not_matter(model, params, alone, order):
    asked = requests(9, seed=2)
    together = Scorer(model=model, params=params, batch_size=4).score([asked[i] for i in order])
    for position, index in enumerate(order):
        np.testing.assert_allclose(
            together[position].token_logprobs, alone[index].token_logprobs, atol=tolerances.RAGGED
        )


def test_head_chunks_do_not_matter(model, params):
    asked = requests(4, seed=3)
    whole = Scorer(model=model, params=params, batch_size=4).score(asked)
    tiny = Scorer(model=model, params=params, batch_size=4, head_bytes=4 * 64 * 3).score(asked)
    for one, other in zip(whole, tiny, strict=True):
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=tolerances.RAGGED)


def test_few_programs_serve_many_lengths(model, params):
    scorer = Scorer(model=model, params=params, batch_size=4)
    before = scoring.score_batch._cache_size()
    for seed in (4, 5):
        scorer.score(requests(60, seed=seed))
    # Lengths 16, 32, 64 times target counts 1, 8, 64 (cut to the length).
    assert scoring.score_batch._cache_size() - before <= 9


def test_logits_are_never_whole(model, params):
    """The compiled program holds no float32 array of batch x length x vocabulary."""
    shape = (8, 64)
    zeros = np.zeros(shape, np.int32)
    text = scoring.score_batch.lower(
        model, None, 64, 16, params, (zeros, zeros, zeros[:, :4], zeros[:, :4])
    ).as_text()
    assert "tensor<16x64xf32>" in text
    assert "8x64x64xf32" not in text and "512x64xf32" not in text


def test_empty_target_and_no_requests(model, params):
    scorer = Scorer(model=model, params=params)
    assert scorer.score([]) == []
    score = scorer.score([Request([1], [])])[0]
    assert (score.logprob, score.is_greedy, len(score.token_logprobs)) == (0.0, True, 0)


def test_length_limit(model, params):
    """64 fed tokens fit, 65 do not unless truncated, and truncation drops the oldest context."""
    rng = np.random.default_rng(6)
    ids = rng.integers(0, 61, 80).tolist()
    scorer = Scorer(model=model, params=params)
    scorer.score([Request(ids[:61], ids[61:65])])
    with pytest.raises(RequestError, match="request 1 needs 65 tokens but max_length=64"):
        scorer.score([Request(ids[:3], ids[3:5]), Request(ids[:62], ids[62:66])])
    left = Scorer(model=model, params=params, truncate="left")
    cut = left.score([Request(ids[:70], ids[70:75])])[0]
    same = scorer.score([Request(ids[10:70], ids[70:75])])[0]
    np.testing.assert_allclose(cut.token_logprobs, same.token_logprobs, atol=tolerances.RAGGED)
    with pytest.raises(RequestError, match="if its target fits"):
        left.score([Request(ids[:2], ids[:70])])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([3, -1], "token -1 at position 1"),
        ([64], "token 64 at position 0"),
        ([2**31 - 1], "token 2147483647"),
        ([1.0], "flat sequence of integers"),
        ([True, False], "flat sequence of integers"),
        ([[1], [2]], "flat sequence of integers"),
        ([[1], [2, 3]], "ragged"),
        ("text", "flat sequence of integers"),
        ([None], "flat sequence of integers"),
    ],
)
@pytest.mark.parametrize("where", ["context", "target"])
def test_bad_tokens_are_named_and_the_next_request_works(model, params, bad, message, where):
    scorer = Scorer(model=model, params=params)
    request = Request(bad, [1]) if where == "context" else Request([1], bad)
    with pytest.raises(RequestError, match=message) as caught:
        scorer.score([Request([1], [2]), request])
    assert f"{where} of request 1" in str(caught.value)
    assert np.isfinite(scorer.score([Request([1], [2])])[0].logprob)


def test_empty_context_is_refused(model, params):
    with pytest.raises(RequestError, match="request 0 has an empty context"):
        Scorer(model=model, params=params).score([Request([], [1])])


def test_bad_settings_are_refused(model, params):
    with pytest.raises(RequestError, match="max_length=65 exceeds"):
        Scorer(model=model, params=params, max_length=65)
    with pytest.raises(RequestError, match="batch_size=0"):
        Scorer(model=model, params=params, batch_size=0)
    other = DecoderLM(ModelConfig(**{**vars(CONFIG), "mask": "bidirectional"}), Execution())
    with pytest.raises(RequestError, match="bidirectional"):
        Scorer(model=other, params=params)
