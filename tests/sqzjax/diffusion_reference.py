# SPDX-License-Identifier: Apache-2.0
"""Block-wise diffusion decoding of small models, and the same by its definition."""

from functools import cache

import jax
import numpy as np

from sqzjax.decode import Diffusion, Generator, SamplingConfig
from sqzjax.models import SpecialTokens
from tests.contracts.decoders import tiny_model, tiny_params

MASK, EOS, BLOCK = 60, 7, 4
PROMPTS = [[5, 9, 2], [11], [4, 4, 8, 30, 2, 17, 1], [3, 1, 4, 1]]


@cache
def model_of(family):
    fields = {
        "block_causal": {"mask": "block_causal", "block_size": BLOCK, "family": "sdar"},
        "bidirectional": {"mask": "bidirectional", "family": "llada"},
        "shifted": {"mask": "bidirectional", "shift_logits": True, "family": "dream"},
        "shifted_blocks": {"mask": "block_causal", "block_size": BLOCK, "shift_logits": True},
    }[family]
    model = tiny_model(**fields, tokens=SpecialTokens(eos=(EOS,), mask=MASK))
    return model, tiny_params(model)


def decode(family, prompts, count=10, sampling=None, row_ids=None, batch_size=None, **options):
    model, params = model_of(family)
    decoder = Diffusion(model=model, block_size=BLOCK, **options)
    sampling = sampling or SamplingConfig(max_new_tokens=count, temperature=0, ignore_eos=True)
    generator = Generator(model, params, decoder=decoder, batch_size=batch_size)
    return generator.generate(prompts, sampling, row_ids=row_ids)


@cache
def forward_of(model):
    return jax.jit(
        lambda params, ids, positions: model.forward(params, ids, positions=positions).logits
    )


def plain(model, params, prompts, count, order, noted=None):
    """Decode by the definition: a whole forward pass per committed position, without a cache.

    Rows are alone: they share passes, of which each sees its own positions. The list `noted` is
    given the log probabilities of each row's tokens.
    """
    aligned = model.config.mask == "block_causal"
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = lengths + count
    totals = -(-ends // BLOCK) * BLOCK if aligned else ends
    ids = np.full((len(prompts), totals.max()), MASK, np.int32)
    for row, prompt in zip(ids, prompts):
        row[: len(prompt)] = prompt
    logprobs = np.zeros(ids.shape)
    positions = np.arange(ids.shape[1], dtype=np.int32)
    positions = np.where(positions < totals[:, None], positions, -1)
    starts = lengths // BLOCK * BLOCK if aligned else lengths.copy()
    while (starts < totals).any():
        found = chances(forward_of(model)(params, ids, positions), model.config)
        for row, chance in enumerate(found):
            start, stop = starts[row], min(starts[row] + BLOCK, totals[row])
            sure = np.where(ids[row, start:stop] == MASK, chance[start:stop].max(-1), -1)
            for place in order(sure) if len(sure) else ():
                ids[row, start + place] = chance[start + place].argmax()
                logprobs[row, start + place] = np.log(chance[start + place].max())
            starts[row] = start if (ids[row, start:stop] == MASK).any() else stop
    if noted is not None:
        noted += [row[n:end] for row, n, end in zip(logprobs, lengths, ends)]
    return [row[n:end].tolist() for row, n, end in zip(ids, lengths, ends)]


def chances(logits, config):
    """Return the distribution at each position over the ids that may be put there, in float64."""
    logits = np.array(logits, np.float64)[..., : config.vocab_size]
    if config.shift_logits:
        logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    logits[..., MASK] = -np.inf
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    return chance / chance.sum(-1, keepdims=True)


def one(sure):
    return [int(sure.argmax())]


def above(level):
    return lambda sure: sorted({int(sure.argmax()), *np.flatnonzero(sure >= level)})
