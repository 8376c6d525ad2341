# SPDX-License-Identifier: Apache-2.0
"""Likelihood bounds of masked diffusion models against all masks, one at a time, in float64."""

import itertools
import json
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import lm_harness, models, needle, report, run, summary
from eval.config import EvalConfig, Likelihood, ModelEntry, Needle
from eval.diffusion_scoring import DiffusionScorer, mask_weights
from eval.scoring import Request
from sqzjax import config as configs
from sqzjax.errors import RequestError
from sqzjax.io import hf
from sqzjax.io import tokenizer as tokenizers
from sqzjax.models import DecoderLM, Execution, ModelConfig, SpecialTokens
from tests import tolerances
from tests.chi_square import p_value
from tests.parameters import drawn

MASK, BLOCK = 11, 3
KINDS = {
    "bidirectional": {"mask": "bidirectional"},
    "shifted": {"mask": "bidirectional", "shift_logits": True},
    "blocks": {"mask": "block_causal", "block_size": BLOCK},
}
REQUESTS = [
    Request([1, 2, 3, 4], [5, 6, 7, 5]),
    Request([1], [9, 8]),
    Request([3, 3, 3, 3, 3], [1]),
    Request([4, 2], [2, 2, 2, 2, 2]),
    Request([1, 2, 3, 4], [6]),
]


@cache
def model_of(kind, block=BLOCK):
    fields = KINDS[kind] | ({"block_size": block} if kind == "blocks" else {})
    config = ModelConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        max_positions=32,
        tokens=SpecialTokens(eos=(10,), mask=MASK),
        **fields,
    )
    model = DecoderLM(config, Execution(scan_layers=False))
    # Large weights: predictions that hardly depend on the input would not tell masks apart.
    return model, drawn(model, 8, scale=4)


def scorer_of(kind, block=BLOCK, samples=128, seed=0, **options):
    model, params = model_of(kind, block)
    settings = {"likelihood": Likelihood(samples=samples, seed=seed), "batch_size": 4} | options
    return DiffusionScorer(model=model, params=params, **settings)


@partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, positions):
    return model.forward(params, tokens[None], positions=positions[None]).logits[0]


def logits_of(model, params, tokens):
    """Logits `[T, V]` of one text; padding keeps all texts in one program."""
    padded, positions = np.zeros(16, np.int32), np.full(16, -1, np.int32)
    padded[: len(tokens)], positions[: len(tokens)] = tokens, np.arange(len(tokens))
    return np.asarray(_forward(model, params, padded, positions), np.float64)[: len(tokens)]


def logprobs(kind, block, tokens):
    """Log-probabilities `[T, V]` of every position's own token, from one plain pass."""
    model, params = model_of(kind, block)
    logits = logits_of(model, params, tokens)
    if model.config.shift_logits:
        logits = np.concatenate([logits[:1], logits[:-1]])
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_bound(kind, block, request):
    """Return the bound as the mean over counts, then over the masks of that count, by its text."""
    tokens, start = [*request.context, *request.target], len(request.context)
    places = range(start, len(tokens))
    groups = [list(places)]
    if kind == "blocks":
        groups = [list(group) for _, group in itertools.groupby(places, lambda i: i // block)]
    total = 0.0
    for group in groups:
        # Later blocks are not there yet, earlier ones are clean.
        seen = tokens[: group[-1] + 1]
        for count in range(1, len(group) + 1):
            sums = []
            for chosen in itertools.combinations(group, count):
                noisy = [MASK if i in chosen else token for i, token in enumerate(seen)]
                found = logprobs(kind, block, noisy)
                sums.append(sum(found[i, tokens[i]] for i in chosen))
            total += len(group) / count * np.mean(sums) / len(group)
    return total


# The bound


@pytest.mark.parametrize("kind", KINDS)
def test_few_masks_are_enumerated_exactly(kind):
    scores = scorer_of(kind).score(REQUESTS)
    for request, score in zip(REQUESTS, scores, strict=True):
        expected = expected_bound(kind, BLOCK, request)
        assert score.logprob == pytest.approx(expected, abs=tolerances.SUMMED_LOGPROB)
        assert len(score.token_logprobs) == len(request.target)
        assert score.token_logprobs.sum() == pytest.approx(score.logprob, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_expectation_of_all_masks(kind):
    """Thirty seeds of 6 masks each: their mean within 4 standard errors, and not all equal."""
    block = 5
    request = Request([1, 2, 4, 9, 8], [5, 6, 7, 5, 3])
    found = np.array(
        [scorer_of(kind, block, 6, seed).score([request])[0].logprob for seed in range(30)]
    )
    expected = expected_bound(kind, block, request)
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert error > 1e-3
    assert abs(found.mean() - expected) < 4 * error


def test_the_bound_is_below_the_likelihood_of_a_true_model():
    """Blocks of one token have one mask: the chain rule itself, whatever the samples."""
    request = REQUESTS[0]
    tokens = [*request.context, *request.target]
    expected = 0.0
    for place in range(4, len(tokens)):
        expected += logprobs("blocks", 1, [*tokens[:place], MASK])[place, tokens[place]]
    for samples in (1, 7):
        score = scorer_of("blocks", 1, samples).score([request])[0]
        assert score.logprob == pytest.approx(expected, abs=tolerances.SUMMED_LOGPROB)


@pytest.mark.parametrize("kind", KINDS)
def test_independent_tokens_leave_nothing_to_bound(kind):
    """Without layers a masked token's distribution is one and the same everywhere."""
    model, params = model_of(kind)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "'o'" in str(path) or "'down'" in str(path) else leaf, params
    )
    if model.config.shift_logits:  # the row before predicts: it must not depend on its token
        params["embed"]["embedding"] = jnp.ones_like(params["embed"]["embedding"])
    logits = logits_of(model, params, [MASK, MASK])[0]
    alone = logits - np.log(np.exp(logits).sum())

    def score(target, seed, samples):
        settings = Likelihood(samples=samples, seed=seed)
        scorer = DiffusionScorer(model=model, params=params, likelihood=settings, batch_size=4)
        return scorer.score([Request([1, 2], target)])[0].logprob

    for seed in range(3):  # no variance at all where all tokens are equally likely
        found = score([7] * 8, seed, 2)
        assert found == pytest.approx(8 * alone[7], abs=tolerances.SUMMED_LOGPROB)
    target = [1, 2, 3, 4, 5, 6]
    exact = alone[target].sum()
    assert score(target, 0, 64) == pytest.approx(exact, abs=tolerances.SUMMED_LOGPROB)


def test_sampled_masks_are_those_of_the_definition():
    """Counts uniform, then every mask of a count equally likely, weighted size/count/samples."""
    size, samples = 4, 12
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(400):
        draw = np.random.default_rng(seed)
        weights = mask_weights(np.array([size]), samples, draw)
        assert weights.shape == (samples, size)
        for row in weights:
            shown = tuple(np.flatnonzero(row).tolist())
            seen[shown] = seen.get(shown, 0) + 1
            assert set(row[row > 0]) == {size / len(shown) / samples}
    assert len(seen) == 2**size - 1
    total = 400 * samples
    expected = [total / size / math.comb(size, len(mask)) for mask in seen]
    assert p_value(np.array(list(seen.values())), np.array(expected)) > tolerances.SAMPLING_P_VALUE


@pytest.mark.parametrize("blocks", [[5], [1, 3, 2], [8, 8], [2, 9, 1]])
def test_every_token_has_weight_one_on_average_over_passes(blocks):
    """With all log-probabilities -1 the bound is minus the number of tokens of each block."""
    weights = mask_weights(np.array(blocks), 40, np.random.default_rng(0))
    edges = np.cumsum([0, *blocks])
    for begin, end in itertools.pairwise(edges):
        assert weights[:, begin:end].sum() == pytest.approx(end - begin)
    small = [2**size - 1 for size in blocks if 2**size - 1 <= 40]
    assert len(weights) == (40 if len(small) < len(blocks) else max(small))


# Batches, seeds, greedy decoding


@pytest.mark.parametrize("kind", ["shifted", "blocks"])
def test_scores_do_not_depend_on_the_batch(kind):
    together = scorer_of(kind, samples=3).score(REQUESTS)
    for request, score in zip(REQUESTS, together, strict=True):
        alone = scorer_of(kind, samples=3, batch_size=1).score([request])[0]
        assert alone.logprob == pytest.approx(score.logprob, abs=tolerances.SUMMED_LOGPROB)
        assert alone.is_greedy == score.is_greedy


def test_the_seed_decides_and_one_context_has_one_set_of_masks():
    request = Request([1, 2], [5, 6, 7, 5, 3, 1, 2])
    first, again = (scorer_of("bidirectional", samples=4).score([request])[0] for _ in "ab")
    assert first.logprob == again.logprob
    other = scorer_of("bidirectional", samples=4, seed=1).score([request])[0]
    assert first.logprob != other.logprob
    scorer = scorer_of("bidirectional", samples=4)
    masks = [
        scorer._weights(np.array([*context, *target]), 7) > 0
        for context, target in (([1, 2], [5] * 7), ([1, 2], [6] * 7), ([2, 2], [5] * 7))
    ]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_filling_the_surest_place_yields(kind):
    context, size = [1, 2, 3, 4], 5
    tokens = [*context, *[MASK] * size]
    left = list(range(4, 9))
    while left:
        found = logprobs(kind, BLOCK, tokens)
        now = [i for i in left if i // BLOCK == left[0] // BLOCK] if kind == "blocks" else left
        place = max(now, key=lambda i: found[i].max())
        tokens[place] = int(found[place].argmax())
        left.remove(place)
    right = tokens[4:]
    requests = [Request(context, right)]
    for place in range(size):
        wrong = list(right)
        wrong[place] = (wrong[place] + 1) % 10
        requests.append(Request(context, wrong))
    scores = scorer_of(kind, samples=1).score(requests)
    assert [score.is_greedy for score in scores] == [True, *[False] * size]


def test_progress_and_empty_targets():
    done = []
    requests = [*REQUESTS, Request([1], [])]
    scores = scorer_of("blocks", samples=1).score(requests, progress=done.append)
    assert sum(done) == len(REQUESTS)
    assert scores[-1].logprob == 0 and scores[-1].is_greedy


def test_an_empty_context_is_fine_unless_logits_are_shifted():
    request = Request([], [3, 4, 5])
    for kind in ("bidirectional", "blocks"):
        score = scorer_of(kind).score([request])[0]
        expected = expected_bound(kind, BLOCK, request)
        assert score.logprob == pytest.approx(expected, abs=tolerances.SUMMED_LOGPROB)
    with pytest.raises(RequestError, match="empty context"):
        scorer_of("shifted").score([request])


def test_what_does_not_fit_is_refused_or_loses_its_oldest_context():
    whole = Request([1, 2, 3, 4, 5, 6], [7, 8, 9])
    with pytest.raises(RequestError, match="max_length=7"):
        scorer_of("bidirectional", max_length=8).score([whole])
    cut = scorer_of("bidirectional", max_length=8, truncate="left").score([whole])[0]
    rest = Request(whole.context[1:], whole.target)
    expected = expected_bound("bidirectional", BLOCK, rest)
    assert cut.logprob == pytest.approx(expected, abs=tolerances.SUMMED_LOGPROB)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask": "causal"}, "not causal"),
        ({"tokens": SpecialTokens()}, "mask token None"),
        ({"mask": "block_causal", "block_size": 2, "shift_logits": True}, "shifted logits"),
    ],
)
def test_models_without_such_a_bound_are_refused(changes, words):
    model, params = model_of("bidirectional")
    other = DecoderLM(ModelConfig(**{**vars(model.config), **changes}), Execution())
    with pytest.raises(RequestError, match=words):
        DiffusionScorer(model=other, params=params)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_length": 33}, {"max_length": 1}])
def test_bad_settings_are_refused(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        scorer_of("blocks", **options)
    with pytest.raises(ValueError, match="samples"):
        Likelihood(samples=0)


# Through the evaluation


@pytest.fixture(scope="module")
def masked_folder(tmp_path_factory):
    folder, files = (tmp_path_factory.mktemp(name) for name in ("masked", "tokenizer"))
    tokenizers.load("bytes").save(files)
    config = ModelConfig(
        family="sdar",
        qk_norm=True,
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        max_positions=128,
        mask="block_causal",
        block_size=2,
        tokens=SpecialTokens(bos=256, eos=(257,), pad=258, mask=259),
    )
    params = drawn(DecoderLM(config, Execution()), 1)
    hf.save(folder / "model", config, params, tokenizer_files=sorted(files.iterdir()))
    return str(folder / "model")


def test_perplexity_is_labelled_as_a_bound(masked_folder, tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("a short story. " * 8)
    likelihood = {"samples": 5, "seed": 3}
    both = [
        {"name": "masked", "path": masked_folder, "likelihood": likelihood},
        {"name": "causal", "path": str(tiny_folder)},
    ]
    task = {"kind": "perplexity", "data": str(tmp_path / "text.txt"), "context": 32}
    config = configs.load(EvalConfig, {"models": both, "tasks": [task], "batch_size": 4})
    assert run.run(config, workdir=tmp_path / "work") == run.OK
    document = json.loads((tmp_path / "work" / "results.json").read_text())
    masked, causal = (result["metrics"] for result in document["results"])
    assert masked["estimate"] == {"kind": "bound", **likelihood}
    assert causal["estimate"] is None
    assert masked["tokens"] == causal["tokens"] > 100
    assert masked["context"] == 31 and causal["context"] == 32
    assert masked["nll"] == pytest.approx(math.log(260), rel=0.25)
    page = report.render(document)
    assert "≤ " in page and "upper bound of a masked diffusion model, 5 masks" in page
    lines = [summary.headline(result) for result in document["results"]]
    assert lines[0].startswith("perplexity ≤ ") and "≤" not in lines[1]


@pytest.mark.slow
def test_multiple_choice_and_needles_rank_by_the_bound(masked_folder):
    entry = ModelEntry(path=masked_folder, likelihood=Likelihood(samples=3))
    model = models.load(entry, batch_size=4)
    pairs = [("The sky is", " blue"), ("The sky is", " red"), ("", "x")]
    found = lm_harness.loglikelihood(model, pairs)
    scorer = model.scorer()
    expected = scorer.score([lm_harness.encode_pair(model.tokenizer, *pair) for pair in pairs])
    assert found == [(score.logprob, score.is_greedy) for score in expected]
    # An untrained model says about log(1/260) for every byte.
    assert found[0][0] == pytest.approx(-5 * math.log(260), rel=0.25)
    text = "many words " * 40
    rolled = lm_harness.loglikelihood_rolling(model, [text])[0]
    assert rolled == pytest.approx(-len(text) * math.log(260), rel=0.25)
    task = Needle(lengths=(90,), depths=(0.5,), samples=1, mode="likelihood", alternatives=2)
    result = needle.run(task, model, scorer, batch_size=4, seed=0)
    assert 1 <= result["mean_rank"] <= 3


def test_saved_answers_outlive_other_likelihood_settings(masked_folder):
    prints = {
        models.load(ModelEntry(path=masked_folder, likelihood=Likelihood(samples=n))).fingerprint
        for n in (3, 4)
    }
    assert len(prints) == 1
