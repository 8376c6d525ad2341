# SPDX-License-Identifier: Apache-2.0
"""Contexts of diffusion decoding: what the masked positions are fed, against definitions."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.decode import Diffusion, Generator, SamplingConfig
from sqzjax.decode import context as contexts
from sqzjax.decode.context import Credit, Residual, Smoothing
from sqzjax.decode.reuse import Dual, Exact, NoReuse
from sqzjax.models import SpecialTokens
from sqzjax.residual_config import ResidualSettings
from tests.contracts.decoders import VOCABULARY, tiny_model
from tests.sqzjax.diffusion_reference import BLOCK, MASK, PROMPTS, decode, model_of, one, plain
from tests.tolerances import CHUNKED


@pytest.mark.slow
def test_a_context_without_weight_is_plain_decoding():
    """Zero weight: the mask's own embedding goes in, so every token is the same."""
    still = ResidualSettings(alpha_rule="fixed", alpha_scale=0.0)
    idle = (Residual(settings=still), Credit(strength=0.0), Smoothing(first=0.0, growth=0.0))
    exact = plain(*model_of("block_causal"), PROMPTS, 10, one)
    shifted = plain(*model_of("shifted"), PROMPTS, 10, one)
    for family, policy, plainly, some in (
        ("block_causal", Exact(), exact, idle),
        ("shifted", Dual(look=64), shifted, idle[:1]),
    ):
        for context in some:
            carried = decode(family, PROMPTS, reuse=policy, context=context)
            np.testing.assert_array_equal(carried.tokens, plainly)


@cache
def embedded_forward_of(model):
    return jax.jit(
        lambda params, embeds, positions: (
            model.forward(params, embeds=embeds, positions=positions).logits
        )
    )


def residual_decode(prompt, count, warmup):
    """Residual Context Diffusion by its definition, in float64 outside the model.

    `warmup`: a pass of its own, which fills nothing, opens a block.
    """
    model, params = model_of("block_causal")
    table = np.asarray(params["embed"]["embedding"], np.float64)
    total = -(-(len(prompt) + count) // BLOCK) * BLOCK
    ids = np.full(-(-max(len(p) + count for p in PROMPTS) // BLOCK) * BLOCK, MASK)
    ids[: len(prompt)] = prompt
    positions = np.where(np.arange(len(ids)) < total, np.arange(len(ids)), -1)[None]
    start = len(prompt) // BLOCK * BLOCK
    while start < total:
        here = slice(start, start + BLOCK)
        alpha, delta = np.zeros(BLOCK), np.zeros((BLOCK, table.shape[1]))
        opening = warmup
        while (ids[here] == MASK).any():
            embeds = table[ids]
            mixed = (1 - alpha[:, None]) * table[MASK] + alpha[:, None] * delta
            embeds[here] = np.where(ids[here, None] == MASK, mixed, embeds[here])
            given = embeds[None].astype(np.float32), positions.astype(np.int32)
            logits = np.array(embedded_forward_of(model)(params, *given)[0], np.float64)[here]
            chance = np.exp(logits - logits.max(-1, keepdims=True))
            chance /= chance.sum(-1, keepdims=True)
            delta = chance @ table
            alpha = -(chance * np.log(chance)).sum(-1) / np.log(chance.shape[-1])
            if not opening:
                allowed = np.where(np.arange(len(table)) == MASK, 0, chance)
                allowed /= allowed.sum(-1, keepdims=True)
                sure = np.where(ids[here] == MASK, allowed.max(-1), -1)
                place = int(sure.argmax())
                ids[start + place] = allowed[place].argmax()
            opening = False
        start += BLOCK
    return ids[len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize(
    ("policy", "context"),
    [
        (Exact(), Residual()),
        (NoReuse(), Residual()),
        (Exact(), Residual(init_from="self")),
    ],
)
def test_residual_decoding_equals_its_definition(policy, context):
    """Of each row by itself, so nothing leaks from one to another."""
    out = decode("block_causal", PROMPTS, reuse=policy, context=context)
    for row, prompt in enumerate(PROMPTS):
        assert out.row(row) == residual_decode(prompt, 10, context.init_from == "self"), row
    assert (out.tokens != plain(*model_of("block_causal"), PROMPTS, 10, one)).any()


@pytest.mark.slow
def test_credit_does_not_leak_between_rows():
    together = decode("block_causal", PROMPTS, reuse=Exact(), context=Credit())
    for row, prompt in enumerate(PROMPTS):
        alone = decode("block_causal", [prompt], reuse=Exact(), context=Credit())
        assert alone.row(0) == together.row(row)


@pytest.mark.slow
def test_a_pass_of_its_own_costs_one_step_per_block():
    count = {"zero": 8, "self": 10, "dirichlet": 8}
    for init_from, steps in count.items():
        context = Residual(init_from=init_from)
        out = decode("block_causal", [[5, 9, 2, 4]], count=8, context=context)
        assert out.stats.steps == steps, init_from


def test_a_reference_model_opens_each_block():
    """The model as its own reference: the first step sees what an extra pass would show."""
    model, params = model_of("block_causal")
    context = Residual(init_from="reference")
    decoder = Diffusion(model=model, context=context, reference=model, reuse=Exact())
    both = {"model": params, "reference": params}
    sampling = SamplingConfig(max_new_tokens=10, temperature=0, ignore_eos=True)
    out = Generator(model, both, decoder=decoder).generate(PROMPTS, sampling)
    own = decode("block_causal", PROMPTS, reuse=Exact(), context=Residual(init_from="self"))
    np.testing.assert_array_equal(out.tokens, own.tokens)
    # A pass of the reference counts like the pass that the model would spend itself.
    passes = out.stats.extra, own.stats.extra
    assert passes[0]["row_forwards"] == passes[1]["row_forwards"]
    blocks = sum(-(-(len(prompt) + 10) // BLOCK) - len(prompt) // BLOCK for prompt in PROMPTS)
    assert passes[0]["reference_forwards"] == blocks


def test_a_reference_of_other_tokens_is_refused():
    model, _ = model_of("block_causal")
    context = Residual(init_from="reference")
    with pytest.raises(ValueError, match="and the model \\('block_causal', 4\\)"):
        other = model_of("bidirectional")[0]
        Diffusion(model=model, context=context, reference=other, reuse=Exact())
    tokens = SpecialTokens(eos=(7,), mask=59)
    other = tiny_model(mask="block_causal", block_size=BLOCK, tokens=tokens)
    with pytest.raises(ValueError, match="mask token 59 and the model 60"):
        Diffusion(model=model, context=context, reference=other, reuse=Exact())


def test_credit_equals_its_definition():
    rng = np.random.default_rng(0)
    model, params = model_of("block_causal")
    credit = Credit(strength=0.7, fading=0.8, sharpness=0.2)
    state = credit.init(model, params, 2, BLOCK)
    adjust = jax.jit(credit.adjust)
    table = np.zeros((2, BLOCK, VOCABULARY))
    for _ in range(3):
        logits = rng.normal(size=(2, BLOCK, VOCABULARY)) * 3
        masked = rng.random((2, BLOCK)) < 0.6
        found, state = adjust(jnp.asarray(logits, jnp.float32), jnp.asarray(masked), state)
        chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        table *= 0.8
        for row, place in np.argwhere(masked):
            best = logits[row, place].argmax()
            table[row, place, best] += chance[row, place, best] ** 0.2
        np.testing.assert_allclose(
            found, logits + 0.7 * np.log1p(table), rtol=CHUNKED["float32"], atol=CHUNKED["float32"]
        )


def test_smoothing_equals_its_definition():
    model, params = model_of("block_causal")
    smoothing = Smoothing(first=0.15, growth=0.1, most=0.3, temperature=2.0)
    embedding = np.asarray(params["embed"]["embedding"], np.float64)
    logits = np.random.default_rng(0).normal(size=(3, BLOCK, VOCABULARY)) * 3
    step = np.array([0, 1, 5])
    given = jnp.asarray(logits, jnp.float32)
    update = jax.jit(smoothing.update, static_argnums=0)
    state = update(model, params, given, jnp.asarray(step), None)
    chance = np.exp(logits / 2.0)
    expected = chance / chance.sum(-1, keepdims=True) @ embedding
    weight = np.array([0.15, 0.25, 0.3])[:, None, None]
    mixed = (1 - weight) * embedding[MASK] + weight * expected
    found = smoothing.embed(params["embed"]["embedding"][MASK], state)
    np.testing.assert_allclose(found, mixed, rtol=CHUNKED["float32"], atol=CHUNKED["float32"])
    fresh = smoothing.init(model, params, 3, BLOCK)
    found = smoothing.embed(params["embed"]["embedding"][MASK], fresh)
    np.testing.assert_array_equal(found, jnp.broadcast_to(embedding[MASK], found.shape))


@pytest.mark.parametrize(
    ("policy", "fields"),
    [
        ("Smoothing", {"most": 1.5}),
        ("Smoothing", {"temperature": 0.0}),
        ("Credit", {"fading": 1.0}),
        ("Credit", {"strength": -1.0}),
    ],
)
def test_contexts_refuse_values_out_of_range(policy, fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        getattr(contexts, policy)(**fields)
